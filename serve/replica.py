"""One engine behind Ray Serve. Speaks tokens only."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from thornback.contracts import Engine, EngineConfig, EngineLoad, InFlight, Output, Request, WeightView
from thornback.serve.config import SpeculationSection
from thornback.serve.engine_loop import EngineLoop
from thornback.serve.speculation import make_retrievers

# An item of a stream costs about 1 ms of work in the processes that it passes. Items of one stream lie this far
# apart for every other stream that runs, so that many streams together take at most a third of a core.
GAP_PER_STREAM_S = 0.003
CALL_TIMEOUT_S = 60.0
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What a gateway must know of the engines: the longest request in tokens, the size of the vocabulary."""

    max_model_len: int
    vocab_size: int
    weight_version: int


class Replica:
    """Owns an engine. A request is one stream of lists of `Output`; whoever leaves the stream aborts the request."""

    async def __init__(  # type: ignore[misc]
        self, model: str, config: EngineConfig, speculation: SpeculationSection | None = None
    ) -> None:
        retrievers, self._learning = make_retrievers(speculation or SpeculationSection())

        def make_engine() -> Engine:
            from thornback.engine import TorchEngine  # torch is imported in the engine's thread, beside Ray's start

            return TorchEngine(model, config, retrievers)

        self._loop = EngineLoop(make_engine, on_failure=_die)
        await self._loop.ready()
        gc.freeze()  # what is loaded by now stays, and need not be gone through at every collection

    async def generate(self, request: Request, streaming: bool, timeout_s: float) -> AsyncGenerator[list[Output], None]:
        """The outputs of a request: as they come, or all in one item at the end. Ends after `timeout_s` seconds."""
        # The gateway keeps the time too; this is for the case that the gateway is gone.
        deadline = asyncio.get_running_loop().time() + timeout_s
        outputs = self._loop.stream(request, GAP_PER_STREAM_S if streaming else None)
        said: dict[int, list[int]] = {}
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    items = await anext(outputs, None)
                if items is None:
                    return
                if self._learning is not None:
                    self._learn(request, said, items)
                yield items
        finally:
            await outputs.aclose()

    def _learn(self, request: Request, said: dict[int, list[int]], items: list[Output]) -> None:
        """Guess from each sample, once it has ended."""
        assert self._learning is not None
        for output in items:
            tokens = said.setdefault(output.index, list(request.output_token_ids))
            tokens += output.token_ids
            if output.finish_reason is not None:
                self._learning.append([*request.prompt_token_ids, *tokens])

    async def describe(self) -> EngineDescription:
        return await self._call(
            lambda engine: EngineDescription(engine.max_model_len, engine.shape.vocab_size, engine.weight_version)
        )

    async def load(self) -> EngineLoad:
        """As of the engine's last step; answers at once, however long a step takes. Raises if the engine failed."""
        await self.check_health()
        assert self._loop.load is not None
        return self._loop.load

    async def load_weights(self, weights: WeightView, version: int, in_flight: InFlight = "recompute") -> None:
        """Answer with other weights from the next step on; `weights` is mapped from the object store."""
        await self._call(lambda engine: engine.load_weights(weights, version, in_flight))

    async def check_health(self) -> None:
        """Ray Serve's health check: a replica whose engine has failed is replaced."""
        if self._loop.failure is not None:
            raise RuntimeError(f"The engine has failed: {self._loop.failure!r}")

    async def _call(self, function: Any) -> Any:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return await self._loop.call(function)


def _die(error: BaseException) -> None:
    """End the process. A health check would take Ray Serve many seconds to replace this replica; and to lose it is
    what the gateway knows how to mend."""
    logger.critical("The engine raised in a step; this replica ends.", exc_info=error)
    logging.shutdown()
    os._exit(1)
