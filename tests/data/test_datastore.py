"""The retrieval datastore against a search by hand, and what becomes of damage."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings

from thornback.contracts import DataError, TokenTree
from thornback.data import Datastore, PromptLookup

DOCUMENTS = st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=30), max_size=6)


def by_hand(documents: list[list[int]], context: list[int], shortest: int = 2) -> Counter:
    """How often each continuation of up to twenty tokens, and each beginning of one, followed the longest match."""
    for match in range(min(16, len(context)), shortest - 1, -1):
        wanted = context[-match:]
        ends = [(d, i + match) for d in documents for i in range(len(d) - match + 1) if d[i : i + match] == wanted]
        if ends:
            return Counter(tuple(d[end : end + n]) for d, end in ends for n in range(1, min(20, len(d) - end) + 1))
    return Counter()


def paths_of(tree: TokenTree) -> dict[tuple[int, ...], float]:
    """The weight of each node, by the tokens on the way to it."""
    ways: list[tuple[int, ...]] = []
    for i, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)):
        assert parent < i
        ways.append((*(ways[parent] if parent >= 0 else ()), token))
    assert len(set(ways)) == len(ways)
    return dict(zip(ways, tree.weights.tolist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.lists(st.integers(0, 4), max_size=20))
def test_what_followed_the_longest_match(documents, context) -> None:
    tree = Datastore.build(documents, 5).retrieve(np.asarray(context, np.int32), 10_000)
    assert paths_of(tree) == by_hand(documents, context)
    places = [d[i : i + tree.match_length] for d in documents for i in range(len(d))]
    assert not len(tree) or context[-tree.match_length :] in places


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(1, 8))
def test_the_most_frequent_nodes_are_kept(documents, context, num_nodes) -> None:
    tree = Datastore.build(documents, 4).retrieve(np.asarray(context, np.int32), num_nodes)
    wanted = by_hand(documents, context)
    assert sorted(tree.weights.tolist(), reverse=True) == [float(n) for _, n in wanted.most_common(num_nodes)]
    assert all(wanted[path] == weight for path, weight in paths_of(tree).items())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40))
def test_prompt_lookup_finds_what_came_before(context) -> None:
    tree = PromptLookup().retrieve(np.asarray(context, np.int32), 10_000)
    wanted: Counter = Counter()
    for match in range(min(16, len(context) - 1), 1, -1):
        ends = [i + match for i in range(len(context) - match) if context[i : i + match] == context[-match:]]
        if ends:
            wanted = Counter(tuple(context[e : e + n]) for e in ends for n in range(1, min(20, len(context) - e) + 1))
            break
    assert paths_of(tree) == wanted


def test_many_matches_are_sampled_evenly_and_counted_in_full() -> None:
    documents = [[1, 2, 3]] * 3000 + [[1, 2, 4]] * 1000
    tree = Datastore.build(documents, 5).retrieve(np.array([1, 2]), 4)
    assert paths_of(tree) == pytest.approx({(3,): 3000, (4,): 1000}, rel=0.05)


def test_a_saved_store_says_the_same(tmp_path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, 400) for _ in range(50)]
    store = Datastore.build(documents, 50, "abc")
    location = str(tmp_path / "store.arrow")
    store.save(location)
    opened = [
        Datastore.open(location, 50, "abc"),
        Datastore.open(f"file://{location}"),
        Datastore.from_buffer(Path(location).read_bytes()),
    ]
    for document in documents[:20]:
        context = document[100:130]
        wanted = paths_of(store.retrieve(context, 40))
        assert wanted
        for other in opened:
            assert paths_of(other.retrieve(context, 40)) == wanted
    assert opened[0].info == store.info


def test_opening_maps_and_does_not_read(tmp_path) -> None:
    location = tmp_path / "store.arrow"
    Datastore.build([np.random.default_rng(0).integers(0, 1000, 300_000)], 1000).save(str(location))
    opened = Datastore.open(str(location))
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(location) in line]
    ranges = [tuple(int(end, 16) for end in where.split("-")) for where in mapped]
    for array in (opened._segments[0].tokens, opened._segments[0].order):
        address = array.__array_interface__["data"][0]
        assert any(low <= address < high for low, high in ranges)


def test_appended_documents_are_found_within_a_second() -> None:
    store = Datastore.build([[1, 2, 3, 4]], 10)
    store.append([1, 2, 3, 5])
    deadline = time.monotonic() + 1
    while paths_of(store.retrieve(np.array([2, 3]), 8)) != {(4,): 1, (5,): 1}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    empty = Datastore()
    empty.append([7, 8, 9])
    empty.wait()
    assert paths_of(empty.retrieve(np.array([7, 8]), 8)) == {(9,): 1}


def test_look_ups_go_on_while_the_store_grows(monkeypatch) -> None:
    """Also across the moment at which the recent part becomes a segment of its own."""
    monkeypatch.setattr("thornback.data.datastore._LARGE", 2000)
    store = Datastore.build([[1, 2, 3]], 10)
    seen: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            seen.append(paths_of(store.retrieve(np.array([1, 2]), 8))[3,])

    thread = threading.Thread(target=ask)
    thread.start()
    for number in range(1500):
        store.append([1, 2, 3])
        if number % 300 == 0:
            store.wait()
    store.wait()
    stop.set()
    thread.join()
    assert seen == sorted(seen), "what was found once was lost"
    assert paths_of(store.retrieve(np.array([1, 2]), 8)) == {(3,): 1501}
    assert len(store._segments) > 2


def test_damage_and_mismatch_are_refused(tmp_path) -> None:
    location = tmp_path / "store.arrow"
    Datastore.build([list(range(50))], 50, "one").save(str(location))
    whole = location.read_bytes()
    with pytest.raises(DataError, match="cannot be read"):
        Datastore.open(str(tmp_path / "none.arrow"))
    with pytest.raises(DataError, match="vocabulary of 50 tokens, but the model's has 49"):
        Datastore.open(str(location), 49)
    with pytest.raises(DataError, match="another tokenizer"):
        Datastore.open(str(location), 50, "two")
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        location.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"damaged|cannot be read"):
            Datastore.open(str(location))
    for change, message in (
        ({"version": 2}, "format 2"),
        ({"num_tokens": 7}, "holds 51 places"),
        ({"x": 1}, "damaged"),
    ):
        info = {"vocab_size": 50, "tokenizer": "", "num_tokens": 50, "num_documents": 1, "version": 1} | change
        table = pa.ipc.open_file(whole).read_all().replace_schema_metadata({"thornback.datastore": json.dumps(info)})
        with pa.ipc.new_file(str(location), table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(DataError, match=message):
            Datastore.open(str(location))
    with pytest.raises(DataError, match="Document 2 holds a token"):
        Datastore.build([[1], [60]], 50)
