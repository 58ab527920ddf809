"""What a rollout worker remembers is found again, and its guesses change no token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.actors.batches import SAMPLING, SHARD, worker
from thornback.actors import RolloutSpec
from thornback.actors.rollout_memory import RolloutMemory
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import EngineConfig, RolloutBatch, SpeculationConfig
from thornback.data import write_rollouts

COSTS = ((1, 1e-3), (256, 1.1e-3))  # a pass of any size costs the same: every guess is worth it


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def batch(model) -> RolloutBatch:
    return worker(model).generate(SHARD, SAMPLING, 0)[0]


def speculating(model, max_sequences: int = 64) -> RolloutWorkerCore:
    config = EngineConfig(speculation=SpeculationConfig(num_nodes=16, max_sequences=max_sequences))
    core = RolloutWorkerCore(RolloutSpec(str(model), engine_config=config, num_threads=1, memory_tokens=1 << 20))
    core.setup()
    return core


def answers(memory: RolloutMemory, batch: RolloutBatch) -> list[list[list[float]]]:
    """What is found after each prompt: tokens, parents, weights."""
    memory.wait()
    trees = [memory.retrieve(batch.prompt(i), 32) for i in range(len(batch))]
    return [[tree.tokens.tolist(), tree.parents.tolist(), tree.weights.tolist()] for tree in trees]


def test_after_a_prompt_its_responses_are_found(batch):
    memory = RolloutMemory(1 << 20)
    memory.remember(batch)
    for i, (tokens, parents, weights) in enumerate(answers(memory, batch)):
        responses = [batch.response(j) for j in range(len(batch)) if batch.prompt_keys[j] == batch.prompt_keys[i]]
        first = {token: weight for token, parent, weight in zip(tokens, parents, weights, strict=True) if parent < 0}
        values, counts = np.unique([response[0] for response in responses], return_counts=True)
        assert first == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_what_was_saved_is_remembered(batch, tmp_path):
    memory, saved = RolloutMemory(1 << 20), RolloutMemory(1 << 20)
    memory.remember(batch)
    memory.remember(batch)
    memory.save(f"{tmp_path}/memory.parquet")
    saved.load(f"{tmp_path}/memory.parquet")
    assert answers(saved, batch) == answers(memory, batch)
    written = RolloutMemory(1 << 20)
    for part in range(2):
        write_rollouts(batch, f"{tmp_path}/reference/part-{part}.parquet")
    written.load(f"{tmp_path}/reference")
    assert answers(written, batch) == answers(memory, batch)
    memory.clear()
    memory.save(f"file://{tmp_path}/empty.parquet")
    memory.load(f"file://{tmp_path}/empty.parquet")
    assert len(memory) == 0


def test_the_older_half_is_forgotten(batch):
    tokens = len(batch.prompt_ids) + len(batch.response_ids)
    memory = RolloutMemory(3 * tokens)
    for _ in range(3):
        memory.remember(batch)
    assert len(memory) == 3 * len(batch)
    memory.remember(batch)
    assert len(batch) < len(memory) < 3 * len(batch)
    assert all(found[0] for found in answers(memory, batch))


def test_guesses_change_no_token_and_are_repeatable(model, batch):
    def run() -> tuple[RolloutBatch, float]:
        core = speculating(model)
        assert [n for n, _ in core.costs()][:5] == [-1, -8, 0, 1, 2]
        core.recall(COSTS, None, batch)
        again, report = core.generate(SHARD, SAMPLING, 0)
        return again, report.speculation.num_accepted_tokens

    first, accepted = run()
    assert accepted > len(batch.response_ids) / 2
    np.testing.assert_array_equal(first.response_ids, batch.response_ids)
    np.testing.assert_allclose(first.logprobs, batch.logprobs, atol=1e-4)
    assert run()[0].logprobs.tobytes() == first.logprobs.tobytes()


def test_guesses_wait_for_few_sequences(model, batch):
    def drafts(max_sequences: int) -> int:
        core = speculating(model, max_sequences)
        core.recall(COSTS, None, batch)
        # 16 sequences, all of one length
        return core.generate(SHARD, replace(SAMPLING, ignore_eos=True), 0)[1].speculation.num_drafts

    assert drafts(15) == 0
    assert drafts(16) > 0


def test_a_plain_worker_reports_no_guesses(model):
    assert worker(model).generate(SHARD, SAMPLING, 0)[1].speculation is None
