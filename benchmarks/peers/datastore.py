"""Retrieval stores over the same tokens, asked by one core: ours, and REST's `draftretriever`.

Each is built in its peer's process, written to a file and opened again; a turn looks up the next contexts one by one,
and reports quantiles of what each look-up took.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from benchmarks.worker import TurnTaker

LONGEST, SHORTEST = 16, 2  # tokens of a context that are looked for, at most and at least


def documents(directory: str) -> list[np.ndarray]:
    """uint16 tokens of every document."""
    tokens, ends = np.load(f"{directory}/tokens.npy"), np.load(f"{directory}/ends.npy")
    return np.split(tokens, ends[:-1])


def _answer(
    turns: TurnTaker, directory: str, per_turn: int, about: dict[str, float], look_up: Callable[[np.ndarray], int]
) -> None:
    """`look_up` says how many tokens it proposes."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    contexts, turn = np.load(f"{directory}/contexts.npy"), 0
    while turns.wait():
        seconds, found = np.empty(per_turn), 0
        for i in range(per_turn):
            context = contexts[(turn * per_turn + i) % len(contexts)]
            started = time.perf_counter()
            found += look_up(context) > 0
            seconds[i] = time.perf_counter() - started
        turn += 1
        p50, p99, p999 = np.percentile(seconds * 1e6, [50, 99, 99.9])
        turns.report(p50=p50, p99=p99, p999=p999, found=found / per_turn, **about)


def thornback(turns: TurnTaker, directory: str, vocab_size: int, num_nodes: int, per_turn: int) -> None:
    from thornback.data import Datastore

    path, of = f"{directory}/store.arrow", documents(directory)
    Datastore.build(of[:2], vocab_size)  # what is compiled is compiled by now
    started = time.perf_counter()
    built = Datastore.build(of, vocab_size)
    seconds = time.perf_counter() - started
    built.save(path)
    del built
    store = Datastore.open(path, vocab_size)
    about = {"build_seconds": seconds, "bytes": float(os.path.getsize(path))}
    _answer(turns, directory, per_turn, about, lambda context: len(store.retrieve(context, num_nodes)))


def draftretriever(turns: TurnTaker, directory: str, vocab_size: int, num_nodes: int, per_turn: int) -> None:
    """REST's: it looks for a suffix of one length; as in REST, the longest comes first."""
    from draftretriever import Reader, Writer

    path, of = f"{directory}/rest.idx", [document.tolist() for document in documents(directory)]
    started = time.perf_counter()
    writer = Writer(path, vocab_size=vocab_size)
    for document in of:
        writer.add_entry(document)
    writer.finalize()
    about = {"build_seconds": time.perf_counter() - started, "bytes": float(os.path.getsize(path))}
    del of
    reader = Reader(index_file_path=path)

    def look_up(context: np.ndarray) -> int:
        ids = context.tolist()
        for length in range(LONGEST, SHORTEST - 1, -1):
            try:
                found = reader.search(ids[-length:], choices=num_nodes)[0]
            except ValueError:  # it found more than it can cut to size
                continue
            if found:
                return len(found)
        return 0

    _answer(turns, directory, per_turn, about, look_up)


def replicas(directory: str, counts: list[int]) -> dict[int, float]:
    """Bytes that a node's processes take for one store, by how many replicas look things up in it: the growth of the
    proportional set sizes of all of Ray's processes and of this one, from before the store is put into the object
    store to when every replica has opened it and has read all of it."""
    import psutil
    import ray

    from thornback.data import Datastore

    @ray.remote(num_cpus=0)
    class Replica:
        def prepare(self, tiny: np.ndarray) -> None:
            """Load all that looking up takes, but for the store."""
            Datastore.from_buffer(tiny).retrieve(np.array([1, 2]), 8)

        def open(self, buffer: np.ndarray, contexts: np.ndarray) -> int:
            self.store = Datastore.from_buffer(buffer)
            read = int(buffer.view(np.uint8)[::512].sum())  # a byte of every page, and more
            return read + sum(len(self.store.retrieve(context, 32)) for context in contexts)

    def taken() -> float:
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return float(sum(process.memory_full_info().pss for process in processes))

    Datastore.build([[1, 2, 3]], 5).save(f"{directory}/tiny.arrow")
    tiny = np.fromfile(f"{directory}/tiny.arrow", np.uint8)
    contexts, sizes = np.load(f"{directory}/contexts.npy")[:1000], {}
    nbytes = os.path.getsize(f"{directory}/store.arrow")
    ray.init(num_cpus=1, object_store_memory=nbytes + (200 << 20), include_dashboard=False, log_to_driver=False)
    try:
        for count in counts:
            actors = [Replica.remote() for _ in range(count)]
            ray.get([actor.prepare.remote(tiny) for actor in actors])
            before = taken()
            buffer = ray.put(np.fromfile(f"{directory}/store.arrow", np.uint8))
            ray.get([actor.open.remote(buffer, contexts) for actor in actors])
            sizes[count] = taken() - before
            for actor in actors:
                ray.kill(actor)
            del buffer
            time.sleep(2)  # for what is dead to be gone
    finally:
        ray.shutdown()
    return sizes
