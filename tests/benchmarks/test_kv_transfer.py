"""The ways to move keys and values move them, and are counted as they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import ray

from benchmarks import kv_transfer
from benchmarks.peers import kv_ways
from benchmarks.peers.kv_churn import FreeList, Side, churned, mean_calls
from thornback.algorithms import SegmentAllocator

NUM_BLOCKS = 12
SOURCE, TARGET = [1, 2, 3, 8], [4, 5, 9, 10]
CALLS = {"blockwise": 256, "layerwise": 64, "merged": 1, "layout": 4, "allocator": 2, "alignment": 3}


def expected(way: str) -> np.ndarray:
    """The receiver's memory afterwards."""
    sent, got = (np.empty((NUM_BLOCKS, kv_ways.BLOCK_BYTES), np.uint8) for _ in range(2))
    kv_ways.fill(sent)
    got[:] = kv_ways.EMPTY
    if way in ("blockwise", "layerwise"):
        kv_ways.by_layer(got)[:, TARGET] = kv_ways.by_layer(sent)[:, SOURCE]
    elif way in ("memcpy", "one message"):
        got[: len(SOURCE)] = sent[: len(SOURCE)]
    else:
        got[TARGET] = sent[SOURCE]
    return got


@pytest.mark.parametrize("transport", ["ipc", "gloo"])
def test_every_way_moves_the_blocks(transport) -> None:
    with kv_ways.TRANSPORTS[transport](NUM_BLOCKS) as (ways, rows):
        for name, way in ways.items():
            rows[:] = kv_ways.EMPTY
            assert way(SOURCE, TARGET) == CALLS.get(name, 1)
            np.testing.assert_array_equal(rows, expected(name))


@pytest.mark.full
def test_the_object_store_moves_them_too() -> None:
    ray.shutdown()  # it starts a Ray of its own; who needs the folder's after this gets a new one
    with kv_ways.TRANSPORTS["object store"](NUM_BLOCKS) as (ways, rows):
        assert "RAY_preallocate_plasma_memory" not in os.environ, "what comes after would do it, too"
        raylet = Path(ray._private.worker._global_node.get_logs_dir_path(), "raylet.out").read_text()
        assert "Preallocating all plasma memory" in raylet
        for name in ("blockwise", "alignment"):
            rows[:] = kv_ways.EMPTY
            ways[name](SOURCE, TARGET)
            np.testing.assert_array_equal(rows, expected("alignment"))


def test_pools_are_as_full_as_they_say() -> None:
    for make in (SegmentAllocator, FreeList):
        side = churned(make, 400, 300, 0)
        assert side.allocator.num_free >= 40
        side.make_room(200)
        assert side.allocator.num_free >= 240
        blocks = side.begin(200)
        assert len(set(blocks)) == 200
    side = Side(FreeList, 100, 0)
    side.begin(10)
    side.grow(1.0)
    assert side.allocator.num_free == 89


def test_segments_need_far_fewer_calls_than_a_free_list() -> None:
    segments, most = mean_calls(SegmentAllocator, 4096, 300, 0.05)
    assert 1 <= segments <= 2 <= most
    assert mean_calls(FreeList, 4096, 300, 0.05)[0] > 10 * segments


def test_who_shares_a_prefix_needs_a_call_more() -> None:
    """At most: it lies in one run, and what is a request's own in another."""
    alone, _ = mean_calls(SegmentAllocator, 4096, 300)
    shared, _ = mean_calls(SegmentAllocator, 4096, 300, sharing=1.0)
    assert alone + 0.5 < shared < alone + 1.5


def test_what_was_timed_is_compared(tmp_path) -> None:
    rows = []
    for transport, slow in (("ipc", 1.2), ("gloo", 1.1), ("object store", 3.0)):
        base = "one message" if transport == "gloo" else "memcpy"
        for name, seconds in (("alignment", slow), (base, 1.0), ("blockwise", 10 * slow)):
            row = {"name": name, "transport": transport, "seconds": seconds}
            rows += [{**row, "tokens": n} for n in (500, 2000)]
    found = kv_transfer.ratios(rows, (500, 2000))
    assert found == pytest.approx(
        {
            "vs_memcpy": 1.2,
            "vs_blockwise": 0.1,
            "vs_blockwise_ipc": 0.1,
            "vs_one_message": 1.1,
            "object_store_vs_memcpy": 3.0,
        }
    )
    kv_transfer.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
