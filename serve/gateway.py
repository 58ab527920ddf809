"""What the endpoints share: the model's text side, its replicas, and the limits."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from thornback.contracts import Request, SamplingParams
from thornback.serve.config import ServeConfig
from thornback.serve.errors import BadRequest, NotFound
from thornback.serve.generation import Piece, generate_pieces
from thornback.serve.limits import Admission
from thornback.serve.merging import merge_streams
from thornback.serve.metrics import Metrics
from thornback.serve.pool import ReplicaPool
from thornback.serve.replica import EngineDescription
from thornback.serve.text import Text

DESCRIBE_TIMEOUT_S = 10.0


class Gateway:
    """One model's requests, from token ids to pieces of text."""

    def __init__(self, config: ServeConfig, text: Text, pool: ReplicaPool) -> None:
        self.config = config
        self.limits = config.limits
        self.text = text
        self.pool = pool
        self.model_name = config.served_model_name
        self.metrics = Metrics(self.model_name)
        self.admission = Admission(self.limits.max_in_flight, self.limits.max_queued, self.limits.queue_timeout_s)
        self.created = int(time.time())
        self._description: EngineDescription | None = None

    async def description(self) -> EngineDescription:
        """What the engines can take; raises `Unavailable` until one is ready."""
        if self._description is None:
            self._description = await self.pool.describe(DESCRIBE_TIMEOUT_S)
        return self._description

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
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streaming: bool
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of all samples of all prompts, as they come. Leaving the iterator aborts what is unfinished."""
        arrival = time.monotonic()
        async with self.admission.admit(len(prompts) * sampling.n):
            self.metrics.queue_time.observe(time.monotonic() - arrival)
            streams = [self._one(i, prompt, sampling, streaming) for i, prompt in enumerate(prompts)]
            async with aclosing(merge_streams(streams)) as pieces:
                async for piece in pieces:
                    yield piece

    def _one(
        self, prompt_index: int, prompt: Sequence[int], sampling: SamplingParams, streaming: bool
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
            timeout_s=self.limits.request_timeout_s,
        )
