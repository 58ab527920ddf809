"""Supervision: what is lost is issued again, whole; what cannot be saved is one sentence with actor, node and work."""

from __future__ import annotations

import os
import time

import pytest
import ray

from thornback.actors import LOST_CALL, ActorPool, Home, Restarts, actor_options
from thornback.contracts import ActorLost, ConfigError


@ray.remote
class Worker:
    """Does what a call says, which may be to die."""

    def __init__(self, number, broken=""):
        self.number = number
        self.broken = broken
        self.state = 0
        if broken == "constructor":
            raise ConfigError("the constructor is broken")

    def setup(self):
        if self.broken == "setup":
            raise ConfigError("the setup is broken")
        if self.broken == "hang":
            time.sleep(60)
        while self.number == 1 and self.broken.startswith("/") and not os.path.exists(self.broken):
            time.sleep(0.05)
        return Home.here()

    def load(self, state):
        self.state = state

    def work(self, value, marker=None, what="die"):
        if marker is not None and not os.path.exists(marker):
            with open(marker, "w"):
                pass
            if what == "die":
                os._exit(1)
            time.sleep(60)
        return value * 10 + self.state

    def die(self):
        os._exit(1)

    def fail(self, error):
        raise error

    @ray.method(num_returns=2)
    def two(self, value):
        return [value] * 1000, value


def spawner(broken=""):
    options = {**actor_options(), "runtime_env": None}  # the cluster's own, of which processes stand by
    return lambda number: Worker.options(**options).remote(number, broken)


@pytest.fixture
def events():
    return []


@pytest.fixture(scope="module")
def shared_pool(ray_cluster):
    pool = ActorPool("worker", spawner(), 2, timeout=60.0, restarts=Restarts(0, lambda kind, message: None))
    pool.wait_ready()
    yield pool
    pool.shutdown()


@pytest.fixture
def pool(shared_pool, events):
    """Two workers, whose replacements are brought to state 5."""
    shared_pool.timeout = 60.0
    shared_pool._restarts = Restarts(5, lambda kind, message: events.append((kind, message)))
    shared_pool._catch_up = lambda actor: [actor.load.remote(5)]
    shared_pool.broadcast("load", (5,), "loading")
    events.clear()
    return shared_pool


def test_more_calls_than_actors_keep_their_order(pool):
    assert pool.map("work", [(i,) for i in range(7)], "counting") == [5, 15, 25, 35, 45, 55, 65]


def test_bulk_returns_stay_references(pool):
    ((bulk, last),) = pool.map("two", [(3,)], "doubling")
    assert isinstance(bulk, ray.ObjectRef)
    assert last == 3
    assert ray.get(bulk) == [3] * 1000


def test_errors_of_ours_arrive_as_they_were_raised(pool):
    with pytest.raises(ConfigError, match=r"^wrong$"):
        pool.map("fail", [(ConfigError("wrong"),)], "failing")
    with pytest.raises(ray.exceptions.RayTaskError, match="a bug"):
        pool.map("fail", [(KeyError("a bug"),)], "failing")


def test_a_dead_actor_is_replaced_caught_up_and_its_work_done(pool, events, tmp_path):
    pids = {home.pid for home in pool.homes}
    calls = [(1,), (2, str(tmp_path / "marker")), (3,)]
    assert pool.map("work", calls, "counting") == [15, 25, 35]
    assert [kind for kind, _ in events] == ["actor_lost", "actor_restarted"]
    assert "died while counting" in events[0][1]
    assert any(f"process {pid} on node" in events[0][1] for pid in pids)
    assert len({home.pid for home in pool.homes} - pids) == 1


def test_an_idle_actor_that_died_is_replaced_when_it_is_needed(pool, events):
    os.kill(pool.homes[0].pid, 9)
    pool.broadcast("load", (5,), "loading")
    assert pool.map("work", [(1,), (2,)], "counting") == [15, 25]
    assert [kind for kind, _ in events] == ["actor_lost", "actor_restarted"]


def test_an_actor_that_hangs_is_replaced_at_its_deadline(pool, events, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_finish_setup", _patiently(pool, pool._finish_setup))
    pool.timeout = 2.0
    assert pool.map("work", [(4, str(tmp_path / "marker"), "hang")], "thinking") == [45]
    assert "did not answer within 2 s while thinking" in events[0][1]


def _patiently(pool, finish):
    """A replacement may take longer to start than the work that was lost."""

    def finish_setup(slot):
        pool.timeout = 60.0
        finish(slot)

    return finish_setup


def test_work_that_takes_every_actor_down_is_given_up(pool):
    with pytest.raises(ActorLost, match=r"died while dying, 3 times in a row"):
        pool.map("die", [()], "dying")


@pytest.mark.parametrize("broken", ["constructor", "setup"])
def test_what_a_constructor_raises_is_told_at_once(ray_cluster, broken):
    started = time.monotonic()
    pool = ActorPool("worker", spawner(broken), 1, timeout=120.0, restarts=Restarts(0, lambda kind, message: None))
    with pytest.raises((ConfigError, ray.exceptions.RayActorError), match=f"the {broken} is broken") as error:
        pool.wait_ready()
    assert time.monotonic() - started < 60  # and not at the deadline
    if broken == "setup":
        assert str(error.value) == "the setup is broken"
    pool.shutdown()


def test_a_setup_that_hangs_names_the_actor(ray_cluster):
    pool = ActorPool("worker", spawner("hang"), 1, timeout=3.0, restarts=Restarts(0, lambda kind, message: None))
    with pytest.raises(ActorLost, match=r"worker 0 did not answer within 3 s while starting"):
        pool.wait_ready()
    pool.shutdown()


def test_an_actor_joins_when_it_is_ready_and_leaves_when_it_dies(ray_cluster, events, tmp_path):
    restarts = Restarts(2, lambda kind, message: events.append((kind, message)))
    marker = tmp_path / "marker"
    pool = ActorPool(
        "worker", spawner(str(marker)), 2, timeout=60.0, restarts=restarts,
        catch_up=lambda actor: [actor.load.remote(5)], elastic=True,
    )  # fmt: skip
    pool.wait_ready(at_least=1)
    assert set(pool.ready) == {0}
    assert pool.map("work", [(1,), (2,), (3,)], "counting") == [15, 25, 35]
    marker.touch()
    while len(pool.ready) < 2:
        pool.admit(seconds=5.0)
    assert pool.landed(pool.send(1, "work", 7), "counting") == 75
    os.kill(pool.homes[0].pid, 9)
    assert pool.landed(pool.send(0, "work", 7), "counting") is LOST_CALL
    assert set(pool.ready) == {1}  # and who comes in its place is not waited for
    pool.broadcast("load", (5,), "loading")
    assert pool.map("work", [(1,), (2,)], "counting") == [15, 25]
    while len(pool.ready) < 2:
        pool.admit(seconds=5.0)
    assert pool.landed(pool.send(0, "work", 7), "counting") == 75
    assert [kind for kind, _ in events] == ["actor_started", "actor_started", "actor_lost", "actor_restarted"]
    assert pool.map("work", [(1, str(tmp_path / "other")), (2,)], "counting") == [15, 25]
    assert len(pool.ready) == 1, "the map waited for the replacement"
    pool.shutdown()


def test_the_budget_of_restarts_ends(ray_cluster, tmp_path):
    pool = ActorPool("worker", spawner(), 1, timeout=60.0, restarts=Restarts(0, lambda kind, message: None))
    with pytest.raises(ActorLost, match=r"died while counting, and this run has replaced 0 lost actors already"):
        pool.map("work", [(1, str(tmp_path / "marker"))], "counting")
    pool.shutdown()
