"""Episodes: what is sampled is what is kept, whatever the environment says, and however long it takes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.actors.batches import advantages, learner, weights_of
from thornback.actors import EpisodeSpec, PromptShard, RolloutSpec
from thornback.actors.reward_model import RewardModelCore
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import (
    CACHED_VERSION,
    FINISH_REASONS,
    Anchor,
    Completion,
    EnvironmentFailed,
    Observation,
    Prompt,
    RolloutBatch,
    SamplingParams,
    anchors_from_arrow,
    anchors_to_arrow,
)
from thornback.data import RuleScorer, load_tokenizer, read_rollouts, render_prompt, render_reply, write_rollouts
from thornback.engine import load_model, sequence_logprobs

# A random model ends its turn at one of these, after about eight tokens.
SAMPLING = SamplingParams(n=3, max_tokens=160, stop_token_ids=tuple(range(20, 140, 9)))
PROMPTS = tuple(Prompt(key, ({"role": "user", "content": f"{key}?"},), key) for key in ("a", "b", "c", "d"))


def tool(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "tool", "content": text},)


class Echo:
    """Answers two turns with what they said, and judges by their number."""

    name, system_prompt, max_turns = "echo", None, 5

    def __init__(self) -> None:
        self.rewards = (Length(),)

    def environment(self, prompt: Prompt, seed: int) -> Echo.Side:
        return Echo.Side(prompt, seed)

    def is_correct(self, completion: Completion) -> bool:
        return completion.num_calls == 2

    class Side:
        def __init__(self, prompt: Prompt, seed: int) -> None:
            self.prompt, self.seed, self.turns = prompt, seed, 0

        def step(self, turn: str) -> Observation:
            self.turns += 1
            judged = {"turns": float(self.turns), "seed": float(self.seed % 1000)}
            if self.turns > 2:
                return Observation(judged=judged)
            return Observation(tool(f"{self.prompt.key}{self.turns}:{turn[:3]}"), 1, judged)


class Length:
    name, range = "length", (0.0, 1e6)

    def __call__(self, completion: Completion) -> float:
        return float(completion.num_tokens)


class Waits(Echo):
    """The first prompt's tool takes its time; each call notes when it came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float]] = []

    def environment(self, prompt, seed):
        side, calls = Echo.Side(prompt, seed), self.calls

        class Slow:
            async def step(self, turn: str) -> Observation:
                calls.append((prompt.key, time.monotonic()))
                await asyncio.sleep(1.5 if prompt.key == "a" else 0.0)
                return side.step(turn)

        return Slow()


class Fails(Echo):
    """One prompt's environment raises, one's says nonsense, one's takes too long, and one's works."""

    def environment(self, prompt, seed):
        side = Echo.Side(prompt, seed)

        class Broken:
            def step(self, turn: str):
                if prompt.key == "a":
                    raise KeyError("no such tool")
                if prompt.key == "b":
                    return "a string"
                return asyncio.sleep(60) if prompt.key == "c" else side.step(turn)

        return Broken()


class Blocks(Echo):
    def environment(self, prompt, seed):
        class Blocking:
            async def step(self, turn: str):
                time.sleep(3)

        return Blocking()


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def shard(model):
    tokenizer = load_tokenizer(model)
    ids = tuple(tuple(render_prompt(tokenizer, p.messages)) for p in PROMPTS)
    return PromptShard(tuple(p.key for p in PROMPTS), ids, (1000, 2000, 3000, 4000))


def worker(model, task, **limits) -> RolloutWorkerCore:
    core = RolloutWorkerCore(RolloutSpec(str(model), num_threads=1, episodes=EpisodeSpec(lambda: task, **limits)))
    core.setup()
    return core


def play(model, shard, task, sampling=SAMPLING, **limits):
    return worker(model, task, **limits).generate(shard, sampling, 0, PROMPTS)


@pytest.fixture(scope="module")
def batch(model, shard) -> RolloutBatch:
    return play(model, shard, Echo())[0]


def reasons(batch: RolloutBatch) -> list[str]:
    return [FINISH_REASONS[i] for i in batch.finish_reason]


def turns_of(batch: RolloutBatch, i: int) -> list[np.ndarray]:
    starts = batch.turn_starts[batch.turn_offsets[i] : batch.turn_offsets[i + 1]]
    return np.split(batch.response(i), starts[1:])


def test_what_the_environment_says_stands_between_and_is_masked(model, batch):
    tokenizer = load_tokenizer(model)
    whole = 0
    for i in range(len(batch)):
        turns = turns_of(batch, i)
        mask = batch.response(i, "loss_mask")
        assert mask[0] == 1
        assert (np.diff(mask) != 0).sum() == len(turns) - 1
        assert (batch.response(i, "logprobs")[mask == 0] == 0).all()
        for number, (said, reply) in enumerate(zip(turns[::2], turns[1::2], strict=False), start=1):
            text = tokenizer.decode(said.tolist(), skip_special_tokens=True)
            wanted = render_reply(tokenizer, tool(f"{batch.prompt_keys[i]}{number}:{text[:3]}"))
            assert reply.tolist() == wanted
        if reasons(batch)[i] == "stop":
            whole += 1
            assert len(turns) == 5
            assert batch.num_calls[i] == 2
            assert batch.judged["turns"][i] == 3
    assert whole >= 8
    assert batch.judged["seed"].tolist() == [0, 1, 2] * 4  # an environment's seed is its sample's


def test_a_reply_is_what_the_chat_template_adds(model):
    tokenizer = load_tokenizer(model)
    begin = [{"role": "user", "content": "a?"}]
    said = tokenizer("so<search>it</search>", add_special_tokens=False).input_ids
    whole = render_prompt(
        tokenizer, [*begin, {"role": "assistant", "content": "so<search>it</search>"}, *tool("found")]
    )
    apart = [*render_prompt(tokenizer, begin), *said, tokenizer.eos_token_id, *render_reply(tokenizer, tool("found"))]
    assert apart == whole


def test_rollouts_repeat_themselves_bit_for_bit(model, shard, batch):
    again, report = play(model, shard, Echo())
    for name in ("response_ids", "logprobs", "loss_mask", "versions", "turn_starts", "num_calls"):
        np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))
    assert report.num_tokens == batch.loss_mask.sum()
    assert not report.failures


def test_a_prompt_may_come_twice(model, shard, batch):
    """Where an epoch ends within a step."""
    twice = PromptShard(shard.keys[:1] * 2, shard.token_ids[:1] * 2, (1000, 1001))
    both, _ = worker(model, Echo()).generate(twice, SAMPLING, 0, PROMPTS[:1] * 2)
    for i, j in ((0, 0), (1, 1), (2, 2), (3, 1), (4, 2)):
        np.testing.assert_array_equal(both.response(i), batch.response(j))


def test_the_learner_agrees_with_the_engine_on_what_the_model_wrote(model, batch):
    sequences = [np.concatenate([batch.prompt(i), batch.response(i)]) for i in range(len(batch))]
    starts = np.diff(batch.prompt_offsets).tolist()
    logprobs = sequence_logprobs(load_model(model, dtype="float32"), sequences, starts)[0].detach().numpy()
    written = batch.loss_mask > 0
    assert np.abs(logprobs - batch.logprobs)[written].max() < 1e-4


def test_rewards_see_who_wrote_what(model, batch):
    judge = RewardModelCore(lambda: RuleScorer(Echo()), str(model))
    judge.setup()
    completions = judge.completions(batch, PROMPTS)
    for i, completion in enumerate(completions):
        assert [turn.by_model for turn in completion.turns] == [n % 2 == 0 for n in range(len(turns_of(batch, i)))]
        assert completion.num_tokens == batch.response(i, "loss_mask").sum()
        assert all(turn.text.strip().startswith("tool") for turn in completion.turns if not turn.by_model)
        assert completion.own_turns == tuple(turn.text for turn in completion.turns[::2])
        assert completion.judged["turns"] == batch.judged["turns"][i]
    table = judge.score(batch, PROMPTS)
    np.testing.assert_array_equal(table.correct, batch.num_calls == 2)


def test_a_slow_tool_holds_up_nobody_else(model, shard):
    task = Waits()
    batch, _ = play(model, shard, task)
    plain, _ = play(model, shard, Echo())
    np.testing.assert_array_equal(batch.response_ids, plain.response_ids)
    first_wait = min(at for key, at in task.calls if key == "a")
    others = [at for key, at in task.calls if key != "a"]
    assert len(others) > 12
    assert max(others) < first_wait + 1.5  # all of their turns, while the first still waited


def test_environments_that_fail_are_counted_and_take_nobody_along(model, shard, batch):
    failed, report = play(model, shard, Fails(), timeout=0.5)
    assert report.failures == {
        "KeyError: 'no such tool'": sum(r == "abort" for r in reasons(failed)[:3]),
        "returned 'a string', no Observation": sum(r == "abort" for r in reasons(failed)[3:6]),
        "TimeoutError: no answer within 0.5 s": sum(r == "abort" for r in reasons(failed)[6:9]),
    }
    assert sum(report.failures.values()) >= 6
    for i in range(9, 12):
        np.testing.assert_array_equal(failed.response(i), batch.response(i))
    judge = RewardModelCore(lambda: RuleScorer(Echo()), str(model))
    judge.setup()
    table = judge.score(failed, PROMPTS)
    aborted = np.array([r == "abort" for r in reasons(failed)])
    np.testing.assert_array_equal(np.isnan(table.rewards["length"]), aborted)
    np.testing.assert_array_equal(np.isnan(table.correct), aborted)


def test_an_environment_that_blocks_its_thread_is_named(model, shard, monkeypatch):
    monkeypatch.setattr("thornback.actors.episodes._GRACE_SECONDS", 0.2)
    with pytest.raises(EnvironmentFailed, match="blocked their thread for 0 s; await"):
        play(model, shard, Blocks(), timeout=0.2)


def test_turns_and_tokens_run_out(model, shard, batch):
    short, _ = play(model, shard, Echo(), max_turns=1)
    assert {r for r, n in zip(reasons(short), np.diff(short.turn_offsets), strict=True) if n == 1} == {"length"}
    assert (np.diff(short.turn_offsets) == 1).all()
    tight, _ = play(model, shard, Echo(), replace(SAMPLING, max_tokens=20))
    assert tight.response_lengths.max() <= 20
    for i in range(len(tight)):
        same = min(len(tight.response(i)), len(batch.response(i)))
        np.testing.assert_array_equal(tight.response(i)[:same], batch.response(i)[:same])
        assert tight.response(i, "loss_mask")[-1] == 1  # no reply that nobody answers


def test_a_cached_episode_takes_the_place_of_a_sample(model, shard, batch):
    """A larger model's, by way of the anchors' file: who wrote what in it, and its calls, come along."""
    kept = anchors_from_arrow(anchors_to_arrow([Anchor("b", {}, 0.0, 3, batch.trajectory(5)), Anchor("a", {}, 0.5, 3)]))
    cached = (None, kept["b"].trajectory, None, None)
    mixed, report = play(model, replace(shard, trajectories=cached), Echo())
    for name in ("response_ids", "logprobs", "loss_mask"):
        np.testing.assert_array_equal(mixed.response(5, name), batch.response(5, name))
    assert (mixed.response(5, "versions") == CACHED_VERSION).all()
    np.testing.assert_array_equal(mixed.turn_starts, batch.turn_starts)
    np.testing.assert_array_equal(mixed.num_calls, batch.num_calls)
    np.testing.assert_array_equal(mixed.judged["turns"], batch.judged["turns"])
    assert report.num_tokens == batch.loss_mask.sum() - batch.response(5, "loss_mask").sum()


def test_what_the_environment_wrote_teaches_nothing(model, batch):
    """Its tokens are context: the loss, its denominators and the update are those of the model's own."""
    core = learner(model)
    report = core.update(0, advantages(batch), batch)
    spoiled = replace(batch, logprobs=np.where(batch.loss_mask == 0, np.float32(-7.0), batch.logprobs))
    other = learner(model)
    again = other.update(0, advantages(batch), spoiled)
    np.testing.assert_array_equal(weights_of(core), weights_of(other))
    assert report.metrics["mismatch/max_abs"] == again.metrics["mismatch/max_abs"] < 1e-4


def test_an_update_is_the_same_from_a_file_and_however_it_is_cut(model, batch, tmp_path):
    write_rollouts(batch, str(tmp_path / "rollouts.parquet"))
    stored = read_rollouts(str(tmp_path / "rollouts.parquet"))
    values = advantages(batch)
    whole, replayed, cut = learner(model), learner(model), learner(model, tokens_per_microbatch=200)
    first = whole.update(0, values, batch)
    assert replayed.update(0, values, stored).metrics == first.metrics
    np.testing.assert_array_equal(weights_of(replayed), weights_of(whole))
    assert cut.update(0, values, batch).metrics["loss"] == pytest.approx(first.metrics["loss"], abs=1e-6)
    np.testing.assert_allclose(weights_of(cut), weights_of(whole), atol=2e-5)
