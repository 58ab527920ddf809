"""Compiled levels grow the trees that passes through the draft's modules grow."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.test_draft_head import requests_of
from thornback.contracts import EngineConfig, SpeculationConfig
from thornback.engine import TorchEngine, copy_parameters, load_model
from thornback.engine.draft_head import DraftHead
from thornback.engine.draft_levels import CompiledLevels, PlainLevels

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64, "seed": 5}
WIDTH, DEPTH = 5, 4  # 15 nodes behind a sequence are in five blocks, or six


@pytest.fixture(params=["head", "model"])
def engine(request, tiny_model, tmp_path) -> TorchEngine:
    model = tiny_model("qwen3")
    if request.param == "head":
        DraftHead.new(load_model(model)).save(tmp_path / "head")
    draft = tmp_path / "head" if request.param == "head" else tiny_model("llama", **SMALL)
    speculation = SpeculationConfig(
        num_nodes=12, adaptive=False, draft=str(draft), draft_depth=DEPTH, draft_top_k=WIDTH
    )
    return TorchEngine(model, EngineConfig(num_threads=1, block_size=4, speculation=speculation))


def both(engine: TorchEngine, sequences: list, least_promise: float = 0.0) -> tuple[list, list]:
    """What compiled levels grow, and what the modules do."""
    drafter, model = engine.drafter, engine.drafter.model
    levels, program = drafter._levels, model.program
    assert isinstance(levels, CompiledLevels)
    compiled = drafter.propose(sequences, least_promise)
    try:
        drafter._levels, model.program = PlainLevels(model, WIDTH), None
        return compiled, drafter.propose(sequences, least_promise)
    finally:
        drafter._levels, model.program = levels, program


def compare(compiled: list, plain: list, num_levels: int = DEPTH) -> None:
    for got, wanted in zip(compiled, plain, strict=True):
        assert len(got.tree[0]) == WIDTH + (num_levels - 1) * WIDTH * WIDTH
        for column, expected in zip(got.tree[:2], wanted.tree[:2], strict=True):
            np.testing.assert_array_equal(column, expected)
        np.testing.assert_allclose(got.tree[2], wanted.tree[2], rtol=1e-4)
        np.testing.assert_allclose([got.norm, got.least], [wanted.norm, wanted.least], rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_same_trees(engine, temperature) -> None:
    """Of sequences of all lengths, their number changing."""
    for request in requests_of(4, temperature=temperature):
        engine.add_request(request)
    for number in (1, 3, 2, 4, 1, 4, 3):
        engine.step()
        sequences = engine.scheduler.running
        compare(*both(engine, sequences[:number]))
        compare(*both(engine, sequences[::-1][:number]))


def test_levels_that_promise_little_are_left_out(engine) -> None:
    for request in requests_of(3):
        engine.add_request(request)
    engine.step()
    sequences = engine.scheduler.running
    promises = []  # of each further level, in all
    growth = [drafted.tree for drafted in engine.drafter.propose(sequences)]
    for start, stop in [(0, WIDTH), *((WIDTH + i * WIDTH**2, WIDTH + (i + 1) * WIDTH**2) for i in range(DEPTH - 2))]:
        promises.append(sum(np.sort(chances[start:stop])[-WIDTH:].sum() for _, _, chances in growth))
    assert sorted(promises, reverse=True) == promises
    for num_levels, (more, less) in enumerate(zip(promises, [*promises[1:], 0.0], strict=True), 2):
        compare(*both(engine, sequences, float(more + less) / 2), num_levels)
    compare(*both(engine, sequences, float(promises[0]) + 0.1), 1)


def test_what_is_learned_is_used(engine, tiny_model) -> None:
    """A target's weights that change, and a head's."""
    (request,) = requests_of(1)
    engine.add_request(request)
    engine.step()
    compare(*both(engine, engine.scheduler.running))
    engine.load_weights(copy_parameters(load_model(tiny_model("qwen3", seed=9))), 1, "recompute")
    engine.step()
    compare(*both(engine, engine.scheduler.running))
    if engine.drafter.head is None:
        return
    before = engine.drafter.propose(engine.scheduler.running)[0].tree
    engine.drafter.load(copy_parameters(DraftHead.new(engine.model, seed=3)))
    compiled, plain = both(engine, engine.scheduler.running)
    compare(compiled, plain)
    assert not np.allclose(compiled[0].tree[2], before[2], rtol=1e-3)
