"""Weights from the learner to the workers: mapped by all of a node, copied once, freed when they are old."""

from __future__ import annotations

import gc
import time

import pytest
import ray

from tests.actors.batches import learner
from tests.actors.fake_rank import FakeRank
from thornback.actors import PublishedWeights, RolloutSpec, WeightStore, actor_options
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.actors.supervision import LearnerLost

MEGABYTE = 1 << 20


class WatchedWorker(RolloutWorkerCore):
    """A rollout worker that says where its parameters lie."""

    def shares(self):
        """Of the parameters: bytes inside the mapped buffer and in all; of the buffer's mapping in this process:
        its own and shared kilobytes."""
        buffer = self.buffer
        start, end = buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes
        parameters = list(self.engine.model.parameters())
        inside = sum(p.nbytes for p in parameters if start <= p.data_ptr() < end)
        return inside, sum(p.nbytes for p in parameters), _mapping_at(start)

    def load_weights(self, buffer, index, version):
        self.buffer = buffer
        super().load_weights(buffer, index, version)


def _mapping_at(address):
    """(name, Private_Dirty in kB) of the memory mapping that an address lies in."""
    name = ""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            fields = line.split()
            if "-" in fields[0] and not fields[0].endswith(":"):
                first, last = (int(x, 16) for x in fields[0].split("-"))
                inside, name = first <= address < last, " ".join(fields[5:])
            elif inside and fields[0] == "Private_Dirty:":
                return name, int(fields[1])
    raise AssertionError("no mapping holds the address")


@pytest.fixture(scope="module")
def options():
    return {**actor_options(), "runtime_env": None}


@pytest.fixture
def store(ray_cluster, options):
    actor = WeightStore.options(**options).remote(keep=2)
    yield actor
    ray.kill(actor)


def test_workers_map_one_copy(ray_cluster, options, store, tiny_model):
    model = tiny_model("qwen3", hidden_size=256, intermediate_size=1024)
    workers = [
        ray.remote(WatchedWorker).options(**options).remote(RolloutSpec(str(model), num_threads=1)) for _ in "ab"
    ]

    buffer, index = learner(model).weights()

    class Rank:
        @ray.method(num_returns=2)
        def weights(self):
            return buffer, index

    rank = ray.remote(Rank).options(**options).remote()
    ray.get([worker.setup.remote() for worker in workers], timeout=120)
    published = ray.get(store.publish.remote([rank], 1, 60.0), timeout=60)
    assert isinstance(published, PublishedWeights)
    ray.get([w.load_weights.remote(published.buffer, published.index, 1) for w in workers], timeout=60)
    for inside, whole, (name, private_dirty) in ray.get([w.shares.remote() for w in workers], timeout=60):
        assert inside == whole > MEGABYTE  # every parameter is a view of the mapped buffer
        assert "plasma" in name or "/dev/shm" in name
        assert private_dirty == 0  # and nothing of the mapping is a process's own
    for actor in (*workers, rank):
        ray.kill(actor)


def test_old_versions_are_freed(ray_cluster, options, store):
    size = 8 * MEGABYTE
    rank = ray.remote(FakeRank).options(**options).remote(size)
    for version in range(1, 30):  # 240 MB in all, in a store of 300 MB that others use too
        published = ray.get(store.publish.remote([rank], version, 60.0), timeout=60)
        values = ray.get(published.buffer)
        assert values[0] == values[-1] == version
        del values
    assert ray.get(store.latest.remote()).version == 29
    gc.collect()
    deadline = time.monotonic() + 20
    while _used_by_objects() > 4 * size and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _used_by_objects() <= 4 * size
    ray.kill(rank)


def _used_by_objects() -> int:
    """Bytes in the object store."""
    from ray._private.internal_api import memory_summary

    text = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    return int(float(text.split("Plasma memory usage ")[1].split(" MiB")[0]) * MEGABYTE)


def test_a_dead_learner_is_told_by_its_kind(ray_cluster, options, store):
    rank = ray.remote(FakeRank).options(**options).remote(1024)
    ray.get(rank.weights.remote()[1])
    ray.kill(rank)
    with pytest.raises(ray.exceptions.RayTaskError) as error:
        ray.get(store.publish.remote([rank], 1, 60.0), timeout=60)
    assert isinstance(error.value.cause, LearnerLost)
    assert ray.get(store.latest.remote()) is None
