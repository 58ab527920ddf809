"""The benchmark of guessed rollouts compares the same work, chosen as it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import rollout_rasd
from benchmarks.epochs import long_tailed, rollout_files, singles
from benchmarks.harness import alternate
from benchmarks.models import deepened, num_parameters
from benchmarks.results import Results
from tests.actors.batches import SAMPLING, SHARD, worker
from thornback.contracts import RolloutBatch
from thornback.data import read_rollouts, write_rollouts


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """What a run of two epochs of two steps leaves: its directory and its policy."""
    directory = tmp_path_factory.mktemp("run")
    core = worker(tiny_model("qwen3"))
    for step in range(4):
        shard = replace(SHARD, seeds=tuple(seed + 1000 * step for seed in SHARD.seeds))
        batch, _ = core.generate(shard, replace(SAMPLING, n=16, max_tokens=20), 0)
        write_rollouts(batch, f"{directory}/rollouts/step-{step + 1:06d}.parquet")
    write_rollouts(batch, f"{directory}/reference_rollouts/part-00000.parquet")
    return directory, tiny_model("qwen3")


def test_more_layers_say_the_same(run, tmp_path):
    _, model = run
    deep = deepened(model, 5)
    assert num_parameters(str(deep)) > num_parameters(str(model))
    plain, deeper = (worker(m).generate(SHARD, SAMPLING, 0)[0] for m in (model, deep))
    np.testing.assert_array_equal(plain.response_ids, deeper.response_ids)


def test_lengths_are_those_of_a_long_tail(run):
    directory, _ = run
    files = rollout_files(directory, 1, 2)
    batch = RolloutBatch.concat([read_rollouts(file) for file in files])
    every = singles(batch, 1, range(len(batch)))
    lengths = [batch.response_lengths[every.index(single)] for single in long_tailed(files, 1, 16, 18, 20)]
    assert len(lengths) == 16
    assert lengths[0] == batch.response_lengths.max()
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.full
def test_both_sides_draw_the_same_tokens(run, tmp_path):
    directory, model = run
    both = rollout_rasd.peers(directory, [str(model)] * 2, steps_per_epoch=2)
    turns = alternate(both, rounds=1, warmups=0)
    rollout_rasd.check_same_tokens(both)
    results = Results("rollout_rasd")
    rollout_rasd.add(results, turns, rollout_rasd.DEMO_LAYERS, 1, num_epochs=2)
    assert set(results.ratios) == {"speedup", "speedup_phase", *(f"speedup_{n}_live" for n in rollout_rasd.LIVE)}
    rollout_rasd.draw(results.rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
