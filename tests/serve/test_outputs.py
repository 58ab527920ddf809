"""What is read of a stream of outputs, and when."""

from __future__ import annotations

import asyncio

import pytest

from thornback.contracts import Output
from thornback.serve.outputs import OutputStream, merge_outputs


def output(token: int, reason=None, index: int = 0) -> Output:
    return Output("r", [token], [-1.0], index, reason)


async def read(stream: OutputStream, gap_s: float = 0.0, seconds: float = 5.0) -> list[list[Output]]:
    deadline = asyncio.get_running_loop().time() + seconds
    return [items async for items in stream.items(deadline, lambda: gap_s)]


@pytest.mark.parametrize("gap_s", [0.0, 0.05])
def test_every_token_is_read_once_and_in_order(gap_s):
    async def main():
        stream = OutputStream(2)
        reading = asyncio.create_task(read(stream, gap_s))
        for t in range(40):
            for index in (0, 1):
                stream.push(output(t, "length" if t == 39 else None, index))
            await asyncio.sleep(0.002)
        items = await reading
        for index in (0, 1):
            assert [t for item in items for o in item if o.index == index for t in o.token_ids] == list(range(40))
        assert (len(items) < 10) == bool(gap_s)
        assert stream.complete

    asyncio.run(main())


def test_the_first_token_and_the_end_do_not_wait():
    async def main():
        loop, stream = asyncio.get_running_loop(), OutputStream(1)
        began = loop.time()
        stream.push(output(1))
        loop.call_later(0.05, stream.push, output(2, "stop"))
        assert len(await read(stream, gap_s=60.0)) == 2
        assert loop.time() - began < 5

    asyncio.run(main())


def test_a_stream_that_fails_or_is_late():
    async def main():
        stream = OutputStream(1)
        stream.push(output(1))
        stream.fail(OSError("gone"))
        with pytest.raises(OSError, match="gone"):
            await read(stream)
        assert stream.ended
        assert not stream.complete
        with pytest.raises(TimeoutError):
            await read(OutputStream(1), seconds=0.02)
        whole = OutputStream(1)
        whole.push(output(1, "stop"))
        whole.fail(OSError("too late"))
        assert len(await read(whole)) == 1

    asyncio.run(main())


def test_merged_outputs():
    top = [[(1, -0.5)]]
    parts = [
        Output("r", [1], [-1.0], 0, None, 3, 8, top, [None]),
        Output("r", [5], [-5.0], 1, "stop", 3),
        Output("r", [2], [-2.0], 0, "length", 4, 0, top),
    ]
    first, second = merge_outputs(parts)
    assert second is parts[1]
    assert first == Output("r", [1, 2], [-1.0, -2.0], 0, "length", 4, 8, top * 2, [None])
