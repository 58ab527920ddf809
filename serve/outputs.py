"""What a request has produced and nobody has read yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from thornback.contracts import Output


class OutputStream:
    """The outputs of one request of so many samples: written as they come, read as many at a time as there are."""

    def __init__(self, num_samples: int) -> None:
        self._open_samples = num_samples
        self.begun = False  # something came
        self._pending: list[Output] = []
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Complete, or failed."""
        return self._ended.is_set()

    @property
    def complete(self) -> bool:
        return self._open_samples == 0

    def push(self, output: Output) -> None:
        self.begun = True
        self._pending.append(output)
        self._open_samples -= output.finish_reason is not None
        if self._open_samples == 0:
            self._ended.set()
        self._arrived.set()

    def end(self) -> None:
        """Nothing comes after what was pushed, although the samples have not ended."""
        self._open_samples = 0
        self._ended.set()

    def fail(self, error: BaseException) -> None:
        """The reader gets this instead of what has not been read."""
        if not self.ended:
            self._error = error
            self._ended.set()
            self._arrived.set()

    async def items(self, deadline: float, gap: Callable[[], float]) -> AsyncGenerator[list[Output], None]:
        """At most one output for each sample in each item. The first come at once; after them, items lie `gap()`
        seconds apart and hold all that was produced meanwhile. Raises what `fail` was given, and `TimeoutError` at
        `deadline` (the loop's time)."""
        while True:
            async with asyncio.timeout_at(deadline):
                await self._arrived.wait()
            self._arrived.clear()
            if self._error is not None:
                raise self._error
            items, self._pending = self._pending, []
            if items:
                yield merge_outputs(items)
            if self.ended and not self._pending:
                if self._error is not None:
                    raise self._error
                return
            if (seconds := gap()) and not self.ended:
                await wait_for_event(self._ended, seconds)  # its end is worth an item of its own


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Whether it came within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


def merge_outputs(outputs: Sequence[Output]) -> list[Output]:
    """One output a sample, in order of first appearance; the version is that of the newest tokens."""
    by_index: dict[int, list[Output]] = {}
    for output in outputs:
        by_index.setdefault(output.index, []).append(output)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in by_index.values()]


def _joined(parts: list[Output]) -> Output:
    first, last = parts[0], parts[-1]
    tops = None
    if first.top_logprobs is not None:
        tops = [top for part in parts for top in part.top_logprobs or ()]
    return Output(
        request_id=first.request_id,
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=[value for part in parts for value in part.logprobs],
        index=first.index,
        finish_reason=last.finish_reason,
        weight_version=last.weight_version,
        num_cached_tokens=first.num_cached_tokens,
        top_logprobs=tops,
        prompt_logprobs=first.prompt_logprobs,
        kv=last.kv,
    )
