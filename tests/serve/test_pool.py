"""What the gateway does when replicas come, go, are lost, slow or unwilling: over replicas that a script answers."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from itertools import count

import pytest

from tests.serve.scripted import CLIENT, FOREVER, LOST, SILENT, Handle, Replica, counting, token
from thornback.algorithms import PlacementConfig, Role, State
from thornback.contracts import InvalidRequest, Request, SamplingParams
from thornback.serve.errors import BadRequest, TimedOut, TooManyRequests, Unavailable
from thornback.serve.limits import Deadlines
from thornback.serve.pool import ReplicaPool
from thornback.serve.weights import WeightKeeper


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("thornback.serve.pool.LOOK_S", 0.02)
    monkeypatch.setattr("thornback.serve.pool.LOOK_EMPTY_S", 0.02)
    monkeypatch.setattr("thornback.serve.pool.DRAIN_S", 0.1)
    monkeypatch.setattr("thornback.serve.linked_replica.SILENCE_S", 1.0)


NUMBERS = count()


def request(num_tokens: int = 300, **sampling) -> Request:
    return Request(
        f"r{next(NUMBERS)}", tuple(range(num_tokens)), SamplingParams(**{"max_tokens": 4, "seed": 1, **sampling})
    )


def pool_of(decode: Handle, prefill: Handle | None = None, **config) -> ReplicaPool:
    handles = {Role.DECODE: decode} if prefill is None else {Role.DECODE: decode, Role.PREFILL: prefill}
    return ReplicaPool(handles, PlacementConfig(**config), WeightKeeper("", "float32"))


async def tokens_of(pool: ReplicaPool, asked: Request, timeout_s: float = 5.0) -> list[int]:
    return [
        t for o in [o async for o in pool.generate(asked, True, Deadlines(timeout_s))] for x in o for t in x.token_ids
    ]


def generate(*replicas: Replica, timeout_s: float = 5.0, deadlines: Deadlines | None = None, **sampling):
    """What came of one request, and the error that it ended with."""

    async def main():
        got = []
        try:
            async for outputs in pool_of(Handle(*replicas)).generate(
                request(1, **sampling), True, deadlines or Deadlines(timeout_s)
            ):
                got += [t for output in outputs for t in output.token_ids]
        except Exception as error:
            return got, error
        return got, None

    return asyncio.run(main())


def idle(pool: ReplicaPool) -> bool:
    return not pool._placer._table[:, :3].any()


# One pool


def test_lost_before_the_first_token():
    first, second = Replica("a", [LOST]), Replica("b", [token(1), token(2, "stop"), token(7, "stop", index=1)])
    assert generate(first, second, n=2) == ([1, 2, 7], None)
    assert first.asked[0].prompt_token_ids == second.asked[0].prompt_token_ids


def test_lost_in_the_middle_of_one_sample():
    replicas = Replica("a", [token(1), token(2), LOST]), Replica("b", [token(3), LOST]), Replica("c")
    assert generate(*replicas, prompt_logprobs=0) == ([1, 2, 3, 4], None)
    asked = [replica.asked[0] for replica in replicas]
    assert [one.output_token_ids for one in asked] == [(), (1, 2), (1, 2, 3)]
    assert [one.sampling.prompt_logprobs for one in asked] == [0, None, None]
    assert len({one.request_id for one in asked}) == 3


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_replica_that_falls_silent_is_given_up_and_then_killed(monkeypatch, comes_back):
    killed = []
    monkeypatch.setattr("thornback.serve.pool.kill_process", lambda *process: killed.append(process))
    monkeypatch.setattr("thornback.serve.pool.FENCE_S", 0.2)
    silent = Replica("a", [token(1), SILENT])

    async def main():
        pool = pool_of(Handle(silent, Replica("b")))
        assert await tokens_of(pool, request()) == [1, 2, 3, 4]
        silent.stopped = not comes_back
        await asyncio.sleep(0.4)

    asyncio.run(main())
    assert killed == ([] if comes_back else [("node", 0, "ServeReplica")])


def test_lost_in_the_middle_of_several_samples():
    got, error = generate(Replica("a", [token(1), LOST]), Replica("b"), n=2)
    assert got == [1]
    assert isinstance(error, Unavailable)
    assert (error.status, error.code) == (503, "replica_lost")
    assert "Retry-After" in error.headers


def test_not_for_ever():
    replicas = [Replica(name, [LOST]) for name in "abcdef"]
    _, error = generate(*replicas)
    assert isinstance(error, Unavailable)
    assert sum(len(replica.asked) for replica in replicas) == 4


def test_what_is_asked_while_nobody_is_there_waits():
    handle = Handle()

    async def main():
        pool = pool_of(handle)
        asked = asyncio.create_task(tokens_of(pool, request()))
        await asyncio.sleep(0.05)
        assert not asked.done()
        handle.replicas.append(Replica("late"))
        assert await asked == [1, 2, 3, 4]
        with pytest.raises(TimedOut):
            await tokens_of(pool_of(Handle()), request(), timeout_s=0.05)
        with pytest.raises(Unavailable):
            await pool_of(Handle()).describe(0.05)

    asyncio.run(main())


def test_what_the_engine_refuses():
    replica = Replica("a", [InvalidRequest("The prompt is empty.")])
    _, error = generate(replica)
    assert isinstance(error, BadRequest)
    assert error.message == "The prompt is empty."
    assert len(replica.asked) == 1


def test_what_nobody_expected_is_not_tried_again():
    replica = Replica("a", [ValueError("bug")])
    _, error = generate(replica)
    assert isinstance(error, Unavailable)
    assert len(replica.asked) == 1


def test_too_slow():
    replica = Replica("a", [token(1), FOREVER])
    got, error = generate(replica, timeout_s=0.5)
    assert got == [1]
    assert isinstance(error, TimedOut)
    assert error.status == 504
    assert replica.aborted == [replica.asked[0].request_id]


def test_a_first_token_that_is_too_late_ends_a_stream():
    replica = Replica("a", [FOREVER])

    async def main():
        at = asyncio.get_running_loop().time() + 0.3
        with pytest.raises(TimedOut, match="not begun after"):
            async for _ in pool_of(Handle(replica)).generate(request(1), True, Deadlines(5.0, 0.3, at)):
                pass
        await asyncio.sleep(0.05)
        assert replica.aborted == [replica.asked[0].request_id]

    asyncio.run(main())


def test_a_first_token_that_is_expected_too_late_is_refused_at_once():
    async def main():
        pool = pool_of(Handle(Replica("a")))
        await tokens_of(pool, request())
        at = asyncio.get_running_loop().time() + 1e-9
        with pytest.raises(TooManyRequests, match="expected to begin within"):
            async for _ in pool.generate(request(), False, Deadlines(5.0, 1e-9, at)):
                pass

    asyncio.run(main())


def test_what_was_taken_on_is_not_refused_when_its_replica_is_lost():
    """However late it is: load has become extreme meanwhile."""
    first, other = Replica("first", [token(1), FOREVER]), Replica("other")

    async def main():
        handle = Handle(first)
        pool = pool_of(handle, refuses=True)
        got = []
        async with aclosing(pool.generate(request(), True, Deadlines(5.0))) as outputs:
            async for items in outputs:
                got += [t for output in items for t in output.token_ids]
                if len(got) == 1:
                    handle.replicas.append(other)
                    while "other" not in pool._placer:
                        await asyncio.sleep(0.01)
                    for _ in range(4):
                        assert pool._placer.place(time.monotonic(), 100_000, whole=True) is not None
                    pool._placer.state, pool._placer._window_end = State.EXTREME_HIGH, float("inf")
                    with pytest.raises(TooManyRequests):
                        await tokens_of(pool, request())
                    first.alive = False
        assert got == [1, 2, 3, 4]

    asyncio.run(main())


def test_weights_that_nobody_is_there_to_take_are_waited_for():
    """And meanwhile the gateway does everything else."""

    async def main():
        pool = pool_of(Handle())
        waiting = asyncio.create_task(pool.updated(1, 0.3))
        await asyncio.wait_for(asyncio.sleep(0.1), 5.0)
        assert not waiting.done()
        with pytest.raises(TimeoutError):
            await waiting

    asyncio.run(main())


def test_leaving_aborts():
    replica = Replica("a", [token(1), FOREVER])

    async def main():
        pool = pool_of(Handle(replica))
        async with aclosing(pool.generate(request(), True, Deadlines(5.0))) as outputs:
            async for _ in outputs:
                break
        assert replica.aborted == [replica.asked[0].request_id]
        assert idle(pool)

    asyncio.run(main())


def test_a_replica_that_is_to_end_gets_nothing_new_and_hands_back_what_can_go_on():
    old, new = Replica("old", [token(1), token(2), FOREVER], [token(1), FOREVER]), Replica("new")
    handle = Handle(old)

    async def main():
        pool = pool_of(handle)
        one = asyncio.create_task(tokens_of(pool, request()))
        two = asyncio.create_task(tokens_of(pool, request(n=2), timeout_s=1.0))
        await asyncio.sleep(0.1)
        old.draining = True
        handle.replicas.append(new)
        await asyncio.sleep(0.06)
        assert await tokens_of(pool, request()) == [1, 2, 3, 4]
        assert not one.done()  # it has its time
        assert await one == [1, 2, 3, 4]
        assert [len(replica.asked) for replica in (old, new)] == [2, 2]
        assert old.asked[0].request_id in old.aborted
        with pytest.raises(TimedOut):  # that could not go on elsewhere
            await two
        await asyncio.sleep(0.05)
        assert [report.replica_id for report in pool.reports()] == ["new"]

    asyncio.run(main())


def test_outputs_that_nobody_waits_for_are_aborted_once():
    replica = Replica("a")

    async def main():
        pool = pool_of(Handle(replica))
        await tokens_of(pool, request())
        for _ in range(3):
            replica.links[-1].push(token(1), True)
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert replica.aborted.count("r") == 1


# Two


def test_a_prompt_goes_one_way_and_its_answer_the_other():
    prefill, decode = Replica("p"), Replica("d")

    async def main():
        pool = pool_of(Handle(decode), Handle(prefill))
        await pool.describe(5.0)
        return [o async for o in pool.generate(request(), True, Deadlines(5.0))], idle(pool)

    items, is_idle = asyncio.run(main())
    assert [t for outputs in items for output in outputs for t in output.token_ids] == [1, 2, 3, 4]
    assert {output.num_cached_tokens for outputs in items[1:] for output in outputs} == {0}  # handed over, not found
    assert prefill.asked[0].export_kv
    assert prefill.shipped == [False]  # they are of one node
    assert decode.taken[0].replica_id == "p"
    assert decode.asked[0].output_token_ids == (1,)
    assert len(prefill.released) == 1
    assert is_idle


@pytest.mark.parametrize("asked", [request(10), request(n=2), request(prompt_logprobs=0)])
def test_what_is_short_or_whole_stays(asked):
    prefill, decode = Replica("p"), Replica("d", [*counting(asked), token(1, "stop", index=1)])

    async def main():
        pool = pool_of(Handle(decode), Handle(prefill))
        await pool.describe(5.0)
        await tokens_of(pool, asked)

    asyncio.run(main())
    assert prefill.asked == []
    assert decode.taken == [None]


def test_where_one_pool_is_lost_the_other_does_its_work():
    for lost in ("p", "d"):
        prefill, decode = Replica("p"), Replica("d")
        (prefill if lost == "p" else decode).alive = False

        async def main(prefill=prefill, decode=decode):
            pool = pool_of(Handle(decode), Handle(prefill))
            assert await tokens_of(pool, request()) == [1, 2, 3, 4]
            assert idle(pool)

        asyncio.run(main())


def test_the_only_decode_replica_is_lost_in_the_middle():
    prefill, decode = Replica("p"), Replica("d", [token(2), LOST])

    async def main():
        pool = pool_of(Handle(decode), Handle(prefill))
        await pool.describe(5.0)
        assert await tokens_of(pool, request()) == [1, 2, 3, 4]

    asyncio.run(main())
    assert prefill.asked[-1].output_token_ids == (1, 2)


def test_replicas_are_asked_in_nobodys_name():
    """Else Ray Serve takes back, when a client leaves, what is asked because of that."""
    prefill, decode = Replica("p"), Replica("d", [token(2), FOREVER])

    async def main():
        CLIENT.set("somebody")
        pool = pool_of(Handle(decode), Handle(prefill))
        await pool.describe(5.0)
        async with aclosing(pool.generate(request(), True, Deadlines(5.0))) as outputs:
            async for items in outputs:
                if items[0].token_ids == [2]:
                    break
        assert decode.aborted == [decode.asked[0].request_id]
        assert len(prefill.released) == 1

    asyncio.run(main())


def test_who_leaves_after_the_first_token_holds_nothing():
    prefill, decode = Replica("p"), Replica("d")

    async def main():
        pool = pool_of(Handle(decode), Handle(prefill))
        await pool.describe(5.0)
        async with aclosing(pool.generate(request(), True, Deadlines(5.0))) as outputs:
            async for _ in outputs:
                break
        assert len(prefill.released) == 1
        assert decode.asked == []
        assert idle(pool)

    asyncio.run(main())


def test_in_extreme_load_what_would_wait_too_long_is_refused_if_that_is_wanted():
    async def main():
        for refuses in (True, False):
            pool = pool_of(Handle(Replica("d", [FOREVER])), refuses=refuses, first_token_seconds=0.01)
            await pool.describe(5.0)
            pool._placer.state, pool._placer._window_end = State.EXTREME_HIGH, float("inf")
            first = asyncio.create_task(tokens_of(pool, request(2000)))
            while not pool._placer._table[:, 0].any():
                await asyncio.sleep(0.01)
            if refuses:
                with pytest.raises(TooManyRequests) as refusal:
                    await tokens_of(pool, request())
                assert refusal.value.headers["Retry-After"]
            else:
                await tokens_of(pool, request())
            first.cancel()

    asyncio.run(main())


def test_prompts_that_begin_alike_go_to_the_same_replica():
    """Although others are as idle."""
    replicas = [Replica(name) for name in "abc"]

    async def main():
        pool = ReplicaPool({Role.DECODE: Handle(*replicas)}, PlacementConfig(), WeightKeeper("", "float32"), 16)
        await pool.describe(5.0)
        while len(pool.reports()) < 3:
            await asyncio.sleep(0.01)
        first = request(300)
        await tokens_of(pool, first)
        (there,) = [r for r in replicas if any(len(one.prompt_token_ids) == 300 for one in r.asked)]
        for extra in range(5):
            await tokens_of(pool, replace(request(300), prompt_token_ids=(*range(300), extra)))
        assert sum(len(one.prompt_token_ids) == 301 for one in there.asked) == 5

    asyncio.run(main())
