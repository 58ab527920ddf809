"""The retrieval datastore against a search by hand, and what becomes of damage."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings

from thornback.contracts import BatchRetriever, DataError, TokenForest, TokenTree
from thornback.data import Datastore, PromptLookup

DOCUMENTS = st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=30), max_size=6)


def by_hand(documents: list[list[int]], context: list[int]) -> tuple[Counter, int]:
    """How often each continuation of up to 32 tokens, and each beginning of one, followed the longest match; and its
    length."""
    for match in range(min(16, len(context)), 1, -1):
        wanted = context[-match:]
        ends = [(d, i + match) for d in documents for i in range(len(d) - match + 1) if d[i : i + match] == wanted]
        if ends:
            lengths = [(d, end, min(32, len(d) - end)) for d, end in ends]
            return Counter(tuple(d[end : end + n]) for d, end, most in lengths for n in range(1, most + 1)), match
    return Counter(), 0


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
    assert (paths_of(tree), tree.match_length) == by_hand(documents, context)


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(1, 8))
def test_the_most_frequent_nodes_are_kept(documents, context, num_nodes) -> None:
    tree = Datastore.build(documents, 4).retrieve(np.asarray(context, np.int32), num_nodes)
    wanted = Counter({path: n for path, n in by_hand(documents, context)[0].items() if len(path) <= num_nodes})
    assert sorted(tree.weights.tolist(), reverse=True) == [float(n) for _, n in wanted.most_common(num_nodes)]
    assert all(wanted[path] == weight for path, weight in paths_of(tree).items())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40))
def test_prompt_lookup_finds_what_came_before(context) -> None:
    tree = PromptLookup().retrieve(np.asarray(context, np.int32), 10_000)
    wanted, longest = Counter(), 0
    for match in range(min(16, len(context) - 1), 1, -1):
        ends = [i + match for i in range(len(context) - match) if context[i : i + match] == context[-match:]]
        if ends:
            wanted = Counter(tuple(context[e : e + n]) for e in ends for n in range(1, min(32, len(context) - e) + 1))
            longest = match
            break
    assert (paths_of(tree), tree.match_length) == (wanted, longest)


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=5))
def test_asked_for_several_contexts_at_once(documents, contexts) -> None:
    tokens = np.array([token for context in contexts for token in context], np.int64)
    stops = np.cumsum([len(context) for context in contexts])
    for retriever in (Datastore.build(documents, 4), PromptLookup()):
        assert isinstance(retriever, BatchRetriever)
        forest = retriever.retrieve_all(tokens, stops, 7)
        alone = TokenForest.of([retriever.retrieve(np.array(context, np.int64), 7) for context in contexts])
        for got, wanted in zip(astuple(forest), astuple(alone), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_of_equals_the_shallowest_and_latest_come_first() -> None:
    context = np.array([1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2])
    assert PromptLookup().retrieve(context, 4).tokens.tolist() == [5, 4, 3, 1]
    store = Datastore.build([[1, 2, 3], [1, 2, 4]], 10)
    assert store.retrieve(context, 1).tokens.tolist() == [4]
    store.append([1, 2, 5])
    store.wait()
    assert store.retrieve(context, 3).tokens.tolist() == [5, 4, 3]


def parts_of(documents: list, cuts: list[int]) -> list[list]:
    ends = [0, *sorted(cut % (len(documents) + 1) for cut in cuts), len(documents)]
    return [documents[start:end] for start, end in pairwise(ends)]


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, st.lists(st.integers(0, 6), max_size=4), st.lists(st.integers(0, 3), min_size=2, max_size=20))
def test_the_split_over_segments_changes_nothing(documents, cuts, context) -> None:
    first, *others = parts_of(documents, cuts)
    store = Datastore.build(first, 4)
    for part in others:
        for document in part:
            store.append(document)
        store.wait()
    assert same(store, Datastore.build(documents, 4), [context])


def same(one: Datastore, other: Datastore, contexts: list, num_nodes: int = 12) -> bool:
    """Whether the stores give the same trees, in the same order, with the same weights to the last bit."""
    trees = [[store.retrieve(np.asarray(context), num_nodes) for context in contexts] for store in (one, other)]
    return all(
        a.match_length == b.match_length
        and [a.tokens.tolist(), a.parents.tolist(), a.weights.tolist()]
        == [b.tokens.tolist(), b.parents.tolist(), b.weights.tolist()]
        for a, b in zip(*trees, strict=True)
    )


def test_samples_are_the_same_however_a_store_is_split(tmp_path) -> None:
    """Up to where places are found in the thinnest suffix array."""
    rng = np.random.default_rng(0)
    documents = [rng.choice(4, size=length, p=[0.97, 0.01, 0.01, 0.01]) for length in rng.integers(1, 400, 2000)]
    contexts = [[0, 0], [0] * 16, [0, 1], [1, 1], [2, 0, 0, 1], *(d[:40] for d in documents[:50])]
    whole = Datastore.build(documents, 4)
    split = Datastore.build(documents[:700], 4)
    for part in parts_of(documents[700:], [3, 4, 600, 900, 1299]):
        for document in part:
            split.append(document)
        split.wait()
    assert len(split._levels.view.segments) > 1
    assert same(whole, split, contexts)
    assert split.info == whole.info
    split.save(str(tmp_path / "store.arrow"))
    assert same(Datastore.open(str(tmp_path / "store.arrow"), 4), whole, contexts)
    weights = whole.retrieve(np.array([0, 1]), 3).weights
    occurrences = sum(int(((d[:-1] == 0) & (d[1:] == 1)).sum()) for d in documents)
    assert 0.5 * occurrences < weights[0] <= occurrences


def test_many_matches_are_sampled_and_counted_in_full() -> None:
    documents = [[1, 2, 3]] * 3000 + [[1, 2, 4]] * 1000
    tree = Datastore.build(documents, 5).retrieve(np.array([1, 2]), 4)
    assert sum(tree.weights) == pytest.approx(4000)
    assert paths_of(tree) == pytest.approx({(3,): 3000, (4,): 1000}, rel=0.3)


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
    (segment,) = opened._levels.view.segments
    for array in (segment.tokens, *segment.orders):
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
    """Also while small segments become large ones and these are merged."""
    monkeypatch.setattr("thornback.data.levels._LARGE", 500)
    store = Datastore.build([[1, 2, 3]], 10)
    seen: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            seen.append(paths_of(store.retrieve(np.array([1, 2]), 8))[3,])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for number in range(1500):
            store.append([1, 2, 3])
            if number % 50 == 0:
                store.wait()
        store.wait()
    finally:
        stop.set()
        thread.join(10)
    assert paths_of(store.retrieve(np.array([1, 2]), 8)) == {(3,): 1501}
    assert max(seen) <= 1.5 * 1501, "a document was counted twice"
    store.close()
    sizes = [len(segment) for segment in store._levels.view.segments[1:]]
    assert len(sizes) < 2 * np.log2(sum(sizes))
    assert sum(sizes) == 6000
    with pytest.raises(ValueError, match="closed"):
        store.append([1])


def test_threads_end_when_there_is_no_work() -> None:
    with Datastore() as store:
        store.append([1, 2, 3])
        store.wait()
        deadline = time.monotonic() + 5
        while any(thread.name.startswith("datastore") for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        store.append([1, 2, 4])
        store.wait()
        assert paths_of(store.retrieve(np.array([1, 2]), 8)) == {(3,): 1, (4,): 1}


def test_a_thread_that_fails_says_so(monkeypatch) -> None:
    def fail(tokens, start):
        raise MemoryError("no room")

    store = Datastore.build([[1, 2, 3]], 10)
    monkeypatch.setattr("thornback.data.levels.Segment.of", fail)
    store.append([1, 2, 4])
    for ask in (store.wait, lambda: store.append([1, 2])):
        with pytest.raises(RuntimeError, match="thread of the datastore failed") as caught:
            ask()
        assert isinstance(caught.value.__cause__, MemoryError)
    assert paths_of(store.retrieve(np.array([1, 2]), 8)) == {(3,): 1}


def test_the_oldest_of_what_was_appended_is_forgotten() -> None:
    store = Datastore.build([[1, 2, 0]], 100, max_tokens=30)
    for number in range(1, 11):
        store.append([1, 2, number])
    store.wait()
    assert {path[0] for path in paths_of(store.retrieve(np.array([1, 2]), 20))} == {*range(11)}
    store.append([1, 2, 11])  # 33 tokens: the last five documents stay
    store.wait()
    assert {path[0] for path in paths_of(store.retrieve(np.array([1, 2]), 20))} == {0, *range(7, 12)}
    assert (store.info.num_documents, store.info.num_tokens) == (6, 18)
    assert same(store, Datastore.build([[1, 2, n] for n in (0, *range(7, 12))], 100), [[1, 2]])
    store.append([1] * 50)  # more than is ever kept
    store.wait()
    assert store.info.num_documents == 1
    assert paths_of(store.retrieve(np.array([1, 2]), 20)) == {(0,): 1}


@settings(max_examples=20, deadline=None)
@given(DOCUMENTS, st.integers(4, 60))
def test_what_is_forgotten_depends_on_the_documents_only(documents, max_tokens) -> None:
    eager, lazy = (Datastore(max_tokens=max_tokens) for _ in range(2))
    for document in documents * 3:
        eager.append(document)
        lazy.append(document)
        eager.wait()
    lazy.wait()
    assert same(eager, lazy, [[0, 0], [1, 2], [3, 1, 0]])


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
        ({"version": 1}, "format 1"),
        ({"num_tokens": 7}, "holds 51 places"),
        ({"x": 1}, "damaged"),
    ):
        info = {"vocab_size": 50, "tokenizer": "", "num_tokens": 50, "num_documents": 1, "version": 2} | change
        file = pa.ipc.open_file(whole)
        schema = file.schema.with_metadata({"thornback.datastore": json.dumps(info)})
        with pa.ipc.new_file(str(location), schema) as writer:
            for i in range(file.num_record_batches):
                writer.write_batch(file.get_batch(i).replace_schema_metadata(schema.metadata))
        with pytest.raises(DataError, match=message):
            Datastore.open(str(location))
    with pytest.raises(DataError, match="Document 2 holds a token"):
        Datastore.build([[1], [60]], 50)
    with pytest.raises(DataError, match="What is appended holds a token"):
        Datastore.build([], 50).append([50])
    with pytest.raises(DataError, match="without a vocabulary"):
        Datastore().save(str(location))


def test_damaged_contents_are_looked_up_safely(tmp_path) -> None:
    """What no check at opening sees: places that are none."""
    location = tmp_path / "store.arrow"
    documents = [[1, 2, 3] * 20] * 200
    Datastore.build(documents, 50).save(str(location))
    file = pa.ipc.open_file(location.read_bytes())
    rng = np.random.default_rng(0)
    with pa.ipc.new_file(str(location), file.schema) as writer:
        for i in range(file.num_record_batches):
            values = rng.integers(0, 1 << 32, file.get_batch(i).num_rows, np.uint32) if i else [1] * 12_200
            writer.write_batch(pa.record_batch([pa.array(values, pa.uint32())], schema=file.schema))
    store = Datastore.open(str(location))
    for context in ([1, 2], [1, 1], [3] * 16):
        store.retrieve(np.array(context), 32)


def test_documents_without_tokens_are_left_out(tmp_path) -> None:
    store = Datastore.build([[], [1, 2, 3], []], 50)
    store.append([])
    store.save(str(tmp_path / "store.arrow"))
    assert Datastore.open(str(tmp_path / "store.arrow")).info == store.info
    assert store.info.num_documents == 1
    Datastore.build([], 50).save(str(tmp_path / "empty.arrow"))
    assert not len(Datastore.open(str(tmp_path / "empty.arrow")).retrieve(np.array([1, 2]), 8))
