"""Rollouts by vLLM: those of the torch engine, with log-probabilities that the learner agrees with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.actors.batches import SAMPLING, SHARD, learner
from tests.actors.test_episodes import PROMPTS, Echo
from tests.actors.test_episodes import SAMPLING as TURNS
from tests.vllm import NEEDS_VLLM
from thornback.actors import EpisodeSpec, PromptShard, RolloutSpec
from thornback.actors.groups import GroupPlayer
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import ConfigError, EngineConfig, RolloutBatch, SpeculationConfig
from thornback.data import load_tokenizer, render_prompt

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3", head_dim=32)


_kept: list[RolloutWorkerCore] = []  # vLLM's engines of a process share what the first to go takes down


def worker(
    model, engine: str, episodes: EpisodeSpec | None = None, speculation: SpeculationConfig | None = None, **options
) -> RolloutWorkerCore:
    config = EngineConfig(max_num_seqs=16, max_model_len=256, kv_cache_memory_bytes=1 << 28, speculation=speculation)
    memory = 1 << 20 if speculation else 0
    spec = RolloutSpec(
        str(model), engine=engine, engine_config=config, engine_options=options,
        num_threads=1, memory_tokens=memory, episodes=episodes,
    )  # fmt: skip
    core = RolloutWorkerCore(spec)
    core.setup()
    _kept.append(core)
    return core


@pytest.fixture(scope="module")
def by_vllm(model) -> RolloutWorkerCore:
    return worker(model, "vllm", EpisodeSpec(Echo))


def same(got: RolloutBatch, wanted: RolloutBatch) -> None:
    """Up to a rollout in twenty, which fell on the border of two tokens."""
    differ = [i for i in range(len(wanted)) if got.response(i).tolist() != wanted.response(i).tolist()]
    assert len(differ) <= len(wanted) // 20
    for i in set(range(len(wanted))) - set(differ):
        at = slice(*wanted.response_offsets[i : i + 2])
        into = slice(*got.response_offsets[i : i + 2])
        np.testing.assert_allclose(got.logprobs[into], wanted.logprobs[at], atol=1e-4)
        np.testing.assert_array_equal(got.loss_mask[into], wanted.loss_mask[at])


def test_rollouts_are_those_of_the_torch_engine(model, by_vllm) -> None:
    by_vllm.player, player = GroupPlayer(by_vllm.engine), by_vllm.player
    try:
        batch, report = by_vllm.generate(SHARD, SAMPLING, 0)
        again, _ = by_vllm.generate(SHARD, SAMPLING, 0)
    finally:
        by_vllm.player = player
    same(batch, worker(model, "torch").generate(SHARD, SAMPLING, 0)[0])
    np.testing.assert_array_equal(batch.response_ids, again.response_ids)
    np.testing.assert_array_equal(batch.logprobs, again.logprobs)
    assert report.num_tokens == len(batch.response_ids)


def test_the_learner_agrees_with_their_log_probabilities_after_updates(model, by_vllm) -> None:
    policy = learner(model)
    by_vllm.player, player = GroupPlayer(by_vllm.engine), by_vllm.player
    try:
        for version in range(3):
            by_vllm.load_weights(*policy.weights(), version)
            batch, _ = by_vllm.generate(replace(SHARD, seeds=(version, 20, 30, 40)), SAMPLING, version)
            report = policy.update(version, np.random.default_rng(version).normal(size=len(batch)), batch)
            assert report.metrics["mismatch/mean_abs"] < 1e-5  # criterion: 1e-3
            assert (batch.versions == version).all()
    finally:
        by_vllm.player = player
    by_vllm.load_weights(*learner(model).weights(), 0)


def test_episodes_are_those_of_the_torch_engine(model, by_vllm) -> None:
    tokenizer = load_tokenizer(model)
    shard = PromptShard(
        tuple(prompt.key for prompt in PROMPTS),
        tuple(tuple(render_prompt(tokenizer, prompt.messages)) for prompt in PROMPTS),
        tuple(range(0, 400, 100)),
    )
    got, _ = by_vllm.generate(shard, TURNS, 0, PROMPTS)
    wanted, _ = worker(model, "torch", EpisodeSpec(Echo)).generate(shard, TURNS, 0, PROMPTS)
    assert (wanted.loss_mask == 0).any(), "the environment said nothing"
    same(got, wanted)


def test_guesses_from_earlier_rollouts_change_none(model) -> None:
    wanted, _ = worker(model, "torch").generate(SHARD, SAMPLING, 0)
    speculation = SpeculationConfig(num_nodes=8, max_sequences=16)
    core = worker(model, "vllm", speculation=speculation)
    core.recall(((-16, 1.0), (-1, 1.0), (0, 0.0), (1, 1.0), (128, 1.1)), None)
    same(core.generate(SHARD, SAMPLING, 0)[0], wanted)
    core.remember(wanted)
    batch, report = core.generate(SHARD, SAMPLING, 0)
    same(batch, wanted)
    assert report.speculation.num_accepted_tokens > report.num_tokens / 3
    again, repeated = core.generate(SHARD, SAMPLING, 0)
    np.testing.assert_array_equal(batch.logprobs, again.logprobs)  # guesses are a function of what is known
    assert report.speculation == repeated.speculation


def test_two_workers_of_vllm_share_a_model_and_its_new_weights(model) -> None:
    """Tensor parallel, in processes of vLLM's own; each takes its part of what is published."""
    core = worker(model, "vllm", tensor_parallel_size=2)
    same(core.generate(SHARD, SAMPLING, 0)[0], worker(model, "torch").generate(SHARD, SAMPLING, 0)[0])
    policy = learner(model)
    batch, _ = core.generate(SHARD, SAMPLING, 0)
    policy.update(0, np.random.default_rng(0).normal(size=len(batch)), batch)
    core.load_weights(*policy.weights(), 1)
    batch, _ = core.generate(SHARD, SAMPLING, 1)
    report = policy.update(1, np.ones(len(batch)), batch)
    assert report.metrics["mismatch/mean_abs"] < 1e-5
    core.engine._llm.engine_core.shutdown()  # its processes


def test_wrong_options_are_told(model) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_sizes.*tensor_parallel_size"):
        worker(model, "vllm", tensor_parallel_sizes=2)
