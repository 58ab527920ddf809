"""What the endpoints share: the model's text side, its replicas, and the limits."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from thornback.contracts import DataError, ModelError, Request, SamplingParams
from thornback.serve.config import ServeConfig
from thornback.serve.errors import RETRY_AFTER, BadRequest, NotFound, TimedOut, Unavailable
from thornback.serve.generation import Piece, generate_pieces
from thornback.serve.limits import Admission, Deadlines
from thornback.serve.merging import merge_streams
from thornback.serve.metrics import Metrics
from thornback.serve.model_source import resolve_model
from thornback.serve.pool import EngineDescription, ReplicaPool
from thornback.serve.protocol.common import GenerationRequest, UpdateWeightsRequest, UpdateWeightsResponse
from thornback.serve.text import Text
from thornback.serve.weights import WeightUpdate

DESCRIBE_TIMEOUT_S = 10.0
COUNTERS_TIMEOUT_S = 3.0


class Gateway:
    """One model's requests, from token ids to pieces of text."""

    def __init__(
        self, config: ServeConfig, text: Text, pool: ReplicaPool, siblings: Callable[[], Any] | None = None
    ) -> None:
        """`siblings`: gives a handle of all gateways, this one among them, where there are several."""
        self.config = config
        self.limits = config.limits
        self.text = text
        self.pool = pool
        self.model_name = config.served_model_name
        self.metrics = Metrics(self.model_name)
        self.admission = Admission(self.limits.max_in_flight, self.limits.max_queued, self.limits.queue_timeout_s)
        self.created = int(time.time())
        self._description: EngineDescription | None = None
        self._siblings = siblings
        self._updating = asyncio.Lock()

    async def description(self) -> EngineDescription:
        """What the engines can take; raises `Unavailable` until one is ready."""
        if self._description is None:
            self._description = await self.pool.describe(DESCRIBE_TIMEOUT_S)
        return self._description

    def counters(self) -> str:
        """What this gateway has counted."""
        return self.metrics.own(self.admission.num_queued)

    async def all_counters(self) -> list[str]:
        """What each gateway has counted; those that have died are left out. Raises `Unavailable` where one does not
        answer: without it the sums would fall, which Prometheus takes for a new start."""
        if self._siblings is None:
            return [self.counters()]
        asked = self._siblings().broadcast("counters")
        try:
            pages = await asked.results_async(timeout_s=COUNTERS_TIMEOUT_S, return_exceptions=True)
        except TimeoutError as error:
            raise Unavailable("A gateway does not answer.", code="not_ready", headers=RETRY_AFTER) from error
        return [page for page in pages if isinstance(page, str)]

    async def update_weights(self, asked: UpdateWeightsRequest) -> UpdateWeightsResponse:
        """Have all replicas answer with other weights; returns once they do. Raises `BadRequest` where these are not
        weights for this server, and `TimedOut`."""
        weights = self.pool.weights
        await self.description()
        async with self._updating:
            version = weights.version + 1 if asked.weight_version is None else asked.weight_version
            if version <= weights.version:
                raise BadRequest(
                    f"weight_version is {version}, but version {weights.version} is served; give a greater one.",
                    param="weight_version",
                )
            try:
                model = resolve_model(asked.model_path)
                stored = await weights.read(WeightUpdate(model, version, asked.in_flight))
            except (ModelError, DataError) as error:
                raise BadRequest(str(error), param="model_path") from error
            weights.take(stored)
            if self._siblings is not None:
                told = self._siblings().broadcast("take_weights", stored)
                await told.results_async(timeout_s=COUNTERS_TIMEOUT_S, return_exceptions=True)
            try:
                num_replicas = await self.pool.updated(version, self.limits.request_timeout_s)
            except TimeoutError as error:
                raise TimedOut(
                    f"Not all replicas have version {version} yet; they go on to it.", code="timeout"
                ) from error
        return UpdateWeightsResponse(weight_version=version, num_replicas=num_replicas)

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            raise NotFound(
                f"There is no model {name!r} here; this server answers as {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    async def check_prompts(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        """Raise `BadRequest` for what could never run. An answer that outgrows the context ends there ("length")."""
        engine = await self.description()
        if len(prompts) * n > self.limits.max_sequences:
            raise BadRequest(
                f"The request asks for {len(prompts) * n} sequences (prompts times n), "
                f"but at most {self.limits.max_sequences} are allowed.",
                param="n",
            )
        longest = max(len(prompt) for prompt in prompts)
        limit = self.limits.max_prompt_tokens or engine.max_model_len
        if longest > limit or longest >= engine.max_model_len:
            raise BadRequest(
                f"A prompt has {longest} tokens, but at most {min(limit, engine.max_model_len - 1)} are allowed.",
                code="context_length_exceeded",
            )
        if any(min(prompt, default=-1) < 0 for prompt in prompts):
            raise BadRequest("A prompt is empty; give at least one token.", param="prompt")
        if any(max(prompt) >= engine.vocab_size for prompt in prompts):
            raise BadRequest(f"A prompt holds a token id beyond the vocabulary of {engine.vocab_size}.", param="prompt")

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, asked: GenerationRequest
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of all samples of all prompts, as they come; `asked` says whether they are streamed, and until when
        they are wanted. Leaving the iterator aborts what is unfinished."""
        arrival, deadlines = time.monotonic(), self._deadlines(asked)
        async with self.admission.admit(len(prompts) * sampling.n, deadlines.first_token_s):
            self.metrics.queue_time.observe(time.monotonic() - arrival)
            streams = [
                self._one(i, prompt, sampling, bool(asked.stream), deadlines) for i, prompt in enumerate(prompts)
            ]
            async with aclosing(merge_streams(streams)) as pieces:
                async for piece in pieces:
                    yield piece

    def _deadlines(self, asked: GenerationRequest) -> Deadlines:
        complete, first = self.limits.request_timeout_s, asked.first_token_seconds
        if asked.request_timeout_s is not None:
            complete = min(complete, asked.request_timeout_s)
        at = None if first is None else asyncio.get_running_loop().time() + first
        return Deadlines(complete, first, at)

    def _one(
        self,
        prompt_index: int,
        prompt: Sequence[int],
        sampling: SamplingParams,
        streaming: bool,
        deadlines: Deadlines,
    ) -> AsyncGenerator[Piece, None]:
        if sampling.seed is None:  # set here, so that another replica can go on where one was lost
            sampling = replace(sampling, seed=secrets.randbits(63))
        return generate_pieces(
            self.pool,
            self.text,
            Request(uuid.uuid4().hex, tuple(prompt), sampling),
            prompt_index,
            self.metrics,
            streaming=streaming,
            deadlines=deadlines,
        )
