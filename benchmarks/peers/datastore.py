"""A retrieval store that one core asks, and one that a node's replicas share."""

from __future__ import annotations

import os
import time

import numpy as np

from benchmarks.worker import TurnTaker


def documents(directory: str) -> list[np.ndarray]:
    """uint16 tokens of every document."""
    tokens, ends = np.load(f"{directory}/tokens.npy"), np.load(f"{directory}/ends.npy")
    return np.split(tokens, ends[:-1])


def thornback(turns: TurnTaker, directory: str, vocab_size: int, num_nodes: int, per_turn: int) -> None:
    """Builds the store, writes it to a file and opens that; a turn looks up the next contexts one by one, and reports
    quantiles of what a look-up took, in microseconds."""
    from thornback.data import Datastore

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    path, of = f"{directory}/store.arrow", documents(directory)
    Datastore.build(of[:2], vocab_size)  # what is compiled is compiled by now
    started = time.perf_counter()
    built = Datastore.build(of, vocab_size)
    about = {"build_seconds": time.perf_counter() - started}
    built.save(path)
    del built
    store = Datastore.open(path, vocab_size)
    about["bytes"] = float(os.path.getsize(path))
    contexts, turn = np.load(f"{directory}/contexts.npy"), 0
    while turns.wait():
        seconds, found = np.empty(per_turn), 0
        for i in range(per_turn):
            context = contexts[(turn * per_turn + i) % len(contexts)]
            started = time.perf_counter()
            tree = store.retrieve(context, num_nodes)
            seconds[i] = time.perf_counter() - started
            found += len(tree) > 0
        turn += 1
        p50, p99, p999 = np.percentile(seconds * 1e6, [50, 99, 99.9])
        turns.report(p50=p50, p99=p99, p999=p999, found=found / per_turn, **about)


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
    for count in counts:
        # A store of its own each time: memory that an earlier one has touched would not count again.
        ray.init(num_cpus=1, object_store_memory=nbytes + (200 << 20), include_dashboard=False, log_to_driver=False)
        try:
            actors = [Replica.remote() for _ in range(count)]  # type: ignore[attr-defined]  # (a Ray actor)
            ray.get([actor.prepare.remote(tiny) for actor in actors])
            before = taken()
            buffer = ray.put(np.fromfile(f"{directory}/store.arrow", np.uint8))
            ray.get([actor.open.remote(buffer, contexts) for actor in actors])
            sizes[count] = taken() - before
        finally:
            ray.shutdown()
    return sizes
