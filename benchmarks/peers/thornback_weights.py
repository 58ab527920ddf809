"""Weights from the learner to four rollout workers of one node: the real actors, with a look into their memory."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.worker import TurnTaker
from thornback.actors import (
    LearnerGroup,
    LearnerSpec,
    OptimizerSpec,
    PolicySpec,
    PublishedWeights,
    RolloutSpec,
    UpdateSpec,
    WeightStore,
    actor_options,
)
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import EngineConfig

DEADLINE = 120.0


class WeighedWorkerCore(RolloutWorkerCore):
    """A rollout worker that can say where its parameters lie."""

    def weigh(self) -> dict[str, Any]:
        """`private`: bytes that this process shares with no other. `shared`: of the parameters' bytes, those that lie
        in mapped shared memory, as `(device, inode, first byte in the file, byte after the last)`."""
        gc.collect()
        regions = list(mapped_regions())
        shared, private_parameters = [], 0
        for parameter in self.engine.model.parameters():  # type: ignore[attr-defined]
            start = parameter.data_ptr()
            size = parameter.numel() * parameter.element_size()
            file = next((r.file_range(start, size) for r in regions if r.is_shared and r.holds(start)), None)
            if file is None:
                private_parameters += size
            else:
                shared.append(file)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        private = sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
        return {"private": private * 1024, "shared": shared, "private_parameters": private_parameters}


class Region:
    """A line of /proc/self/maps."""

    def __init__(self, line: str) -> None:
        span, permissions, offset, device, inode = line.split()[:5]
        self.start, self.end = (int(x, 16) for x in span.split("-"))
        self.is_shared = permissions[3] == "s"
        self._file = (device, inode)
        self._offset = int(offset, 16)

    def holds(self, address: int) -> bool:
        return self.start <= address < self.end

    def file_range(self, address: int, size: int) -> tuple[str, str, int, int]:
        first = self._offset + address - self.start
        return (*self._file, first, first + size)


def mapped_regions() -> Iterator[Region]:
    return map(Region, Path("/proc/self/maps").read_text().splitlines())


def distinct_bytes(ranges: list[tuple[str, str, int, int]]) -> int:
    """How much of their files these ranges cover, whatever lies in several of them once."""
    total, file_end = 0, ("", "", 0)
    for device, inode, start, end in sorted(set(ranges)):
        covered = file_end[2] if file_end[:2] == (device, inode) else 0
        total += max(0, end - max(start, covered))
        file_end = (device, inode, max(end, covered))
    return total


WeighedWorker = ray.remote(WeighedWorkerCore)


def sync(turns: TurnTaker, model: str, small_model: str, num_workers: int, store_bytes: int) -> None:
    """A turn: publish the learner's weights as a new version, and load it into every worker."""
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=store_bytes,
        num_cpus=len(os.sched_getaffinity(0)),
    )
    learner = LearnerGroup(
        LearnerSpec(
            policy=PolicySpec(model=model),
            optimizer=OptimizerSpec(learning_rate=1e-6),
            update=UpdateSpec(),
            num_threads=1,
            timeout=DEADLINE,
        )
    )
    learner.start()
    store = WeightStore.options(**actor_options()).remote()
    workers = [make_worker(model) for _ in range(num_workers)]
    version = 0
    while turns.wait():
        version += 1
        started = time.perf_counter()
        published: PublishedWeights = ray.get(store.publish.remote(learner.ranks, version, DEADLINE), timeout=DEADLINE)
        publishing = time.perf_counter() - started
        loads = [w.load_weights.remote(published.buffer, published.index, version) for w in workers]
        ray.get(loads, timeout=DEADLINE)
        seconds = time.perf_counter() - started
        turns.report(seconds=seconds, publishing=publishing, **weigh(workers, small_model))
    learner.shutdown()
    ray.shutdown()


def make_worker(model: str) -> Any:
    config = EngineConfig(max_num_seqs=1, num_blocks=4)
    worker = WeighedWorker.options(**actor_options()).remote(RolloutSpec(model, engine_config=config, num_threads=1))
    ray.get(worker.setup.remote(), timeout=DEADLINE)
    return worker


def weigh(workers: list[Any], small_model: str) -> dict[str, float]:
    """Bytes that the weights take for all workers together: mapped memory once, and whatever more private memory
    each has than a worker with next to no parameters."""
    control = make_worker(small_model)
    empty = ray.get(control.weigh.remote(), timeout=DEADLINE)["private"]
    ray.kill(control)
    found = ray.get([w.weigh.remote() for w in workers], timeout=DEADLINE)
    mapped = distinct_bytes([tuple(r) for f in found for r in f["shared"]])
    return {
        "mapped_bytes": mapped,
        "private_bytes": sum(max(0, f["private"] - empty) for f in found),
        "private_parameter_bytes": sum(f["private_parameters"] for f in found),
    }


def copy(turns: TurnTaker, nbytes: int) -> None:
    """The measure: the same bytes from one buffer to another, both touched before, by one thread."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    while turns.wait():
        started = time.perf_counter()
        np.copyto(target, source)
        turns.report(seconds=time.perf_counter() - started)
