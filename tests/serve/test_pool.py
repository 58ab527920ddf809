"""What the gateway does when replicas are lost, slow or unwilling: the pool over a handle that a script answers."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from thornback.contracts import InvalidRequest, Output, Request, SamplingParams
from thornback.serve.engine_loop import EngineFailed
from thornback.serve.errors import BadRequest, TimedOut, Unavailable
from thornback.serve.pool import ReplicaPool

FOREVER = object()


class Items:
    """A stream of a script: outputs to give, an error to raise, or FOREVER."""

    def __init__(self, script):
        self._script = iter(script)
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        step = next(self._script, None)
        if step is None:
            raise StopAsyncIteration
        if step is FOREVER:
            await asyncio.sleep(3600)
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self):
        self.cancelled = True


class Handle:
    """Answers call after call with the next script; remembers what was asked."""

    def __init__(self, *scripts):
        self._scripts = list(scripts)
        self.asked: list[Request] = []
        self.given: list[Items] = []
        self.generate = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, request, streaming, timeout_s):
        self.asked.append(request)
        self.given.append(Items(self._scripts.pop(0)))
        return self.given[-1]


def token(value, reason=None, index=0):
    return [Output("r", [value], [-1.0], index, reason)]


def generate(handle, n=1, timeout_s=5.0, **sampling):
    request = Request("r", (9,), SamplingParams(n=n, max_tokens=8, seed=1, **sampling))

    async def main():
        got = []
        try:
            async for outputs in ReplicaPool(handle).generate(request, True, timeout_s):
                got += [t for output in outputs for t in output.token_ids]
        except Exception as error:
            return got, error
        return got, None

    return asyncio.run(main())


def test_lost_before_the_first_token():
    handle = Handle([ActorDiedError()], [token(1), token(2, "stop")])
    assert generate(handle, n=2) == ([1, 2], None)
    assert handle.asked[0] == handle.asked[1]


def test_lost_in_the_middle_of_one_sample():
    handle = Handle([token(1), token(2), ActorDiedError()], [token(3), ActorDiedError()], [token(4, "stop")])
    assert generate(handle, prompt_logprobs=0) == ([1, 2, 3, 4], None)
    assert [request.output_token_ids for request in handle.asked] == [(), (1, 2), (1, 2, 3)]
    assert [request.sampling.prompt_logprobs for request in handle.asked] == [0, None, None]


def test_lost_in_the_middle_of_several_samples():
    got, error = generate(Handle([token(1), ActorDiedError()]), n=2)
    assert got == [1]
    assert isinstance(error, Unavailable)
    assert (error.status, error.code) == (503, "replica_lost")
    assert "Retry-After" in error.headers


@pytest.mark.parametrize("loss", [ActorDiedError(), DeploymentUnavailableError("d")])
def test_not_for_ever(loss):
    handle = Handle(*[[loss]] * 5)
    _, error = generate(handle)
    assert isinstance(error, Unavailable)
    assert len(handle.asked) == 3


def test_what_the_engine_refuses():
    refusal = InvalidRequest("The prompt is empty.")
    handle = Handle([RayTaskError("generate", "traceback", refusal).as_instanceof_cause()])
    _, error = generate(handle)
    assert isinstance(error, BadRequest)
    assert error.message == "The prompt is empty."
    assert len(handle.asked) == 1


def test_an_engine_that_fails():
    failure = RayTaskError("generate", "traceback", EngineFailed("out of memory")).as_instanceof_cause()
    handle = Handle([token(1), failure], [token(2, "stop")])
    assert generate(handle) == ([1, 2], None)
    assert handle.asked[1].output_token_ids == (1,)


def test_what_nobody_expected_is_not_tried_again():
    handle = Handle([RayTaskError("generate", "traceback", ValueError("bug")).as_instanceof_cause()])
    _, error = generate(handle)
    assert isinstance(error, Unavailable)


def test_too_slow():
    handle = Handle([token(1), FOREVER])
    got, error = generate(handle, timeout_s=0.05)
    assert got == [1]
    assert isinstance(error, TimedOut)
    assert error.status == 504
    assert handle.given[0].cancelled


def test_leaving_cancels():
    handle = Handle([token(1), FOREVER])

    async def main():
        stream = ReplicaPool(handle).generate(Request("r", (9,)), True, 5.0)
        assert await anext(stream) == token(1)
        await stream.aclose()
        assert handle.given[0].cancelled

    asyncio.run(main())
