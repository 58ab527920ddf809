"""Speculation changes how many passes an answer takes, and nothing else."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest

from tests.engine.trees import tree_of
from thornback.contracts import ConfigError, EngineConfig, Request, SamplingParams, SpeculationConfig, TokenTree
from thornback.engine import TorchEngine, generate
from thornback.engine.speculation import TRIAL_NODES

VOCABULARY = 64


class Oracle:
    """Knows what will be said, and says so among other things: so that every shape of agreement comes up."""

    def __init__(self, sequences: list[list[int]], seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        self.sequences, self.rng, self.vocabulary = sequences, np.random.default_rng(seed), vocabulary
        self.asked = 0

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        self.asked += 1
        known = context.tolist()
        paths = [self.rng.integers(0, self.vocabulary, self.rng.integers(1, 5)).tolist() for _ in range(3)]
        for tokens in self.sequences:
            if tokens[: len(known)] == known:
                right = tokens[len(known) : len(known) + int(self.rng.integers(1, 7))]
                paths.append(right)
                for cut in range(len(right)):  # wrong turns off the right way
                    paths.append([*right[:cut], int(self.rng.integers(0, self.vocabulary))])
        self.rng.shuffle(paths)
        return tree_of([p for p in paths if p])


def requests_of(count: int, **sampling) -> list[Request]:
    rng = np.random.default_rng(count)
    return [
        Request(
            str(i),
            tuple(int(t) for t in rng.integers(5, VOCABULARY, 3 + 5 * (i % 6))),
            SamplingParams(**{"max_tokens": 24, "seed": 100 + i, "ignore_eos": True, **sampling}),
        )
        for i in range(count)
    ]


def compare(model, requests: list[Request], config: dict, least: float = 0.2) -> TorchEngine:
    """Run without and with speculation; the latter must need fewer passes and say the same."""
    plain = generate(TorchEngine(model, EngineConfig(num_threads=1, **config)), requests)
    sequences = [
        [*request.prompt_token_ids, *sample.token_ids.tolist()]
        for request in requests
        for sample in plain[request.request_id]
    ]
    oracle = Oracle(sequences)
    speculation = SpeculationConfig(num_nodes=20, adaptive=False)
    engine = TorchEngine(model, EngineConfig(num_threads=1, speculation=speculation, **config), (oracle,))
    fast = generate(engine, requests)
    for key, samples in plain.items():
        for wanted, got in zip(samples, fast[key], strict=True):
            assert got.token_ids.tolist() == wanted.token_ids.tolist()
            assert got.finish_reason == wanted.finish_reason
            np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)
    counts = engine.speculation
    assert counts.num_accepted_tokens >= least * counts.num_drafts, "the oracle was not believed"
    assert engine.load().num_free_blocks == engine.load().num_blocks
    return engine


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 8])
def test_lossless(tiny_model, architecture, temperature, batch) -> None:
    compare(tiny_model(architecture), requests_of(batch, temperature=temperature), {}, least=1.0)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 5, "min_p": 0.02},
        {"min_tokens": 9, "ignore_eos": False, "stop_token_ids": tuple(range(20, 40))},
        {"stop_token_ids": (7, 9, 11, 13), "logprobs": 2},
        {"n": 3, "prompt_logprobs": 1},
    ],
)
def test_lossless_with_every_parameter(tiny_model, sampling) -> None:
    compare(tiny_model("qwen3"), requests_of(6, **sampling), {})


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_lossless_when_memory_is_short(tiny_model, block_size) -> None:
    config = {
        "block_size": block_size,
        "num_blocks": 112 // block_size,
        "max_num_batched_tokens": 40,
        "max_num_seqs": 5,
    }
    engine = compare(tiny_model("qwen3"), requests_of(9), config)
    assert engine.load().num_preempted > 0


def test_exact_in_float64(tiny_model) -> None:
    """Also through torch's attention, where trees are masks."""
    compare(tiny_model("llama"), requests_of(5), {"dtype": "float64"}, least=1.0)


def test_plain_requests_beside_speculating_ones(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("thornback.engine.attention._FEW", 6)  # larger trees go through torch's attention
    compare(tiny_model("qwen3"), requests_of(8), {})


def test_alternatives_and_counts(tiny_model) -> None:
    requests = requests_of(2, logprobs=3)
    plain = generate(TorchEngine(tiny_model("qwen3"), EngineConfig(num_threads=1)), requests)
    oracle = Oracle([[*r.prompt_token_ids, *plain[r.request_id][0].token_ids.tolist()] for r in requests])
    engine = TorchEngine(
        tiny_model("qwen3"),
        EngineConfig(num_threads=1, speculation=SpeculationConfig(num_nodes=12, adaptive=False)),
        (oracle,),
    )
    for request in requests:
        engine.add_request(request)
    passes = tokens = 0
    while engine.has_unfinished_requests():
        passes += 1
        for output in engine.step():
            tokens += len(output.token_ids)
            assert len(output.token_ids) == len(output.logprobs) == len(output.top_logprobs)
            for logprob, top in zip(output.logprobs, output.top_logprobs, strict=True):
                assert len(top) == 3
                assert logprob <= top[0][1] + 1e-6
    assert tokens == 48
    assert passes < 24
    counts = engine.speculation
    assert counts.num_drafts + counts.num_accepted_tokens + 2 <= tokens  # drafts' passes and what they gained
    assert counts.num_draft_tokens <= 12 * counts.num_drafts


class Failing(Oracle):
    """Answers some questions, then not, or with nonsense."""

    def __init__(self, sequences: list[list[int]], nonsense: TokenTree | None) -> None:
        super().__init__(sequences)
        self.nonsense = nonsense

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        if self.asked < 7:
            return super().retrieve(context, num_nodes)
        if self.nonsense is None:
            raise OSError("the store is gone")
        return self.nonsense


def column(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        TokenTree(column(3, 10_000), column(-1, 0), np.ones(2, np.float32)),
        TokenTree(column(-3), column(-1), np.ones(1, np.float32)),
        TokenTree(column(3, 4), column(1, -1), np.ones(2, np.float32)),
        TokenTree(column(3, 4), column(-1, 0), np.ones(3, np.float32)),
    ],
)
def test_a_retriever_that_fails_ends_the_guessing_only(tiny_model, nonsense, caplog) -> None:
    requests = requests_of(3)
    plain = generate(TorchEngine(tiny_model("qwen3"), EngineConfig(num_threads=1)), requests)
    known = [[*r.prompt_token_ids, *plain[r.request_id][0].token_ids.tolist()] for r in requests]
    config = EngineConfig(num_threads=1, speculation=SpeculationConfig(adaptive=False))
    engine = TorchEngine(tiny_model("qwen3"), config, (Failing(known, nonsense),))
    got = generate(engine, requests)
    for key, samples in plain.items():
        assert got[key][0].token_ids.tolist() == samples[0].token_ids.tolist()
    assert engine.speculation.num_drafts > 0
    assert engine.speculation.num_failures == 3
    assert len([r for r in caplog.records if "without speculation" in r.message]) == 3


def test_a_request_that_every_source_fails_is_counted_once(tiny_model) -> None:
    nobody = Failing([], None)
    nobody.asked = 7
    config = EngineConfig(num_threads=1, speculation=SpeculationConfig(adaptive=False))
    engine = TorchEngine(tiny_model("qwen3"), config, (nobody, nobody))
    generate(engine, requests_of(3))
    assert engine.speculation.num_failures == 3


def test_adaptive_speculation_is_lossless_and_learns(tiny_model) -> None:
    requests = requests_of(4, max_tokens=120, temperature=0.0)
    plain = generate(TorchEngine(tiny_model("qwen3"), EngineConfig(num_threads=1)), requests)
    known = [[*r.prompt_token_ids, *plain[r.request_id][0].token_ids.tolist()] for r in requests]
    engine = TorchEngine(
        tiny_model("qwen3"), EngineConfig(num_threads=1, speculation=SpeculationConfig()), (Oracle(known),)
    )
    got = generate(engine, requests)
    for key, samples in plain.items():
        assert got[key][0].token_ids.tolist() == samples[0].token_ids.tolist()
    assert engine.speculation.num_drafts > 0


def test_a_tree_that_no_pass_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_nodes is 64"):
        SpeculationConfig(num_nodes=64)


def test_a_window_shorter_than_the_sequence_is_refused(tiny_model, tmp_path) -> None:
    directory = tmp_path / "window"
    shutil.copytree(tiny_model("qwen2"), directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config))
    speculation = SpeculationConfig()
    with pytest.raises(ConfigError, match="last 16 tokens only"):
        TorchEngine(directory, EngineConfig(num_threads=1, speculation=speculation), (Oracle([]),))
    TorchEngine(directory, EngineConfig(num_threads=1, speculation=speculation, max_model_len=16), (Oracle([]),))


def test_what_a_step_takes_is_tried_and_leaves_nothing_behind(tiny_model) -> None:
    """Beside what passes take: for a step and for each of its sequences."""
    oracle = Oracle([])
    engine = TorchEngine(tiny_model("qwen3"), EngineConfig(num_threads=1, speculation=SpeculationConfig()), (oracle,))
    assert oracle.asked > 0, "what asking costs is not in it"
    one, several, (nothing, of_sequence), *passes = engine.speculation.costs
    assert (one[0], several[0]) == (-1, -8)
    assert 0 < one[1] < several[1] < 0.1
    assert nothing == 0 <= of_sequence < 0.1
    assert [seconds for _, seconds in passes] == sorted(seconds for _, seconds in passes)
    assert not engine.has_unfinished_requests()
    load, stats = engine.load(), engine.speculation.stats
    assert load.num_free_blocks == load.num_blocks
    assert (stats.num_drafts, stats.num_failures) == (0, 0)


def test_where_steps_are_slow_few_are_tried(tiny_model, monkeypatch) -> None:
    engine = TorchEngine(tiny_model("qwen3"), EngineConfig(num_threads=1, speculation=SpeculationConfig()), ())
    assert engine.speculation.costs == ()  # nobody guesses
    engine = TorchEngine(
        tiny_model("qwen3"), EngineConfig(num_threads=1, speculation=SpeculationConfig()), (Oracle([]),)
    )
    passes, forward = [], engine.runner.forward

    def slow(*args):
        passes.append(1)
        time.sleep(0.02)
        return forward(*args)

    monkeypatch.setattr(engine.runner, "forward", slow)
    monkeypatch.setattr("thornback.engine.step_trials._SECONDS", 0.01)
    engine.measure_costs()
    assert len(passes) < 50, "an engine that takes seconds a pass would take minutes to start"
    assert not engine.has_unfinished_requests()
    assert engine.load().num_free_blocks == engine.load().num_blocks
    assert dict(engine.speculation.costs)[-1] > 0.02


def test_overhead_is_what_steps_take_beyond_their_passes(tiny_model) -> None:
    config = EngineConfig(num_threads=1, speculation=SpeculationConfig(costs=((0, 2e-3), (1, 1e-3), (64, 8e-3))))
    speculation = TorchEngine(tiny_model("qwen3"), config, (Oracle([]),)).speculation
    assert speculation.costs == config.speculation.costs
    assert speculation.trials() is None
    passes = np.interp([1 + TRIAL_NODES, 8 * (1 + TRIAL_NODES)], [1, 64], [1e-3, 8e-3])
    plain = {1: 3e-3, 8: 9e-3}
    speculation.add_overhead({1: passes[0] + 5e-3, 8: passes[1] + 12e-3}, plain)  # 4 ms a step, 1 ms a sequence
    np.testing.assert_allclose(speculation.costs, [(-1, 3e-3), (-8, 9e-3), (0, 1e-3), (1, 5e-3), (64, 12e-3)])
