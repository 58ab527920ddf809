"""The benchmarks' own sides do what the harness asks of them: small, but through the real doors."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import rl_step
from benchmarks.harness import Peer, alternate
from benchmarks.models import benchmark_model
from benchmarks.workload import Workload

WORK = Workload(num_prompts=4, num_prefixes=2, prefix_length=16, suffix_length=4, new_tokens=3)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.mark.full
def test_both_generators_make_as_many_tokens(tmp_path: Path) -> None:
    settings = {"model": benchmark_model(tmp_path, "0.1M"), "threads": 1, "workload": WORK.settings()}
    targets = ("thornback_engine", "hf_generate")
    peers = [Peer(name, f"benchmarks.peers.{name}:rollout", settings, ONE_THREAD) for name in targets]
    turns = alternate(peers, rounds=1, warmups=0)
    assert [turns[name].all("tokens") for name in targets] == [[12], [12]]


@pytest.mark.full
def test_a_training_step_reports_its_tokens_and_phases(tmp_path: Path) -> None:
    model = benchmark_model(tmp_path, "0.1M")
    batch = {"prompts": 2, "samples": 2, "new_tokens": 4}
    ours, _, products = rl_step.peers(model, str(tmp_path), batch, threads=1)
    turns = alternate([ours, products], rounds=1, warmups=0)
    (step,) = turns[ours.name].values
    assert step["tokens"] == 16
    assert sum(step[f"phase/{p}"] for p in ("rollout", "reward", "update", "sync")) < step["seconds"]
    assert turns[products.name].median("mm") > 1e8
