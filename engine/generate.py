"""Runs requests to their end on any engine and collects what each sample became."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from thornback.contracts import Engine, Output, Request


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished sample: `token_ids` int32, `logprobs` float32 and `versions` int32, all `[T]`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str


class Collector:
    """Gathers the outputs of many requests, step by step."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], tuple[list[int], list[float], list[int]]] = {}
        self.finished: dict[tuple[str, int], Sample] = {}

    def take(self, outputs: Iterable[Output]) -> None:
        for out in outputs:
            key = (out.request_id, out.index)
            parts = self._parts.get(key)
            if parts is None:
                parts = self._parts[key] = ([], [], [])
            tokens, logprobs, versions = parts
            tokens += out.token_ids
            logprobs += out.logprobs
            versions += [out.weight_version] * len(out.token_ids)
            if out.finish_reason is not None:
                del self._parts[key]
                self.finished[key] = Sample(
                    np.asarray(tokens, np.int32),
                    np.asarray(logprobs, np.float32),
                    np.asarray(versions, np.int32),
                    out.finish_reason,
                )

    def forget(self, request_id: str) -> None:
        """Drop what is there of a request that was given up."""
        for parts in (self._parts, self.finished):
            for key in [key for key in parts if key[0] == request_id]:
                del parts[key]

    def drain(self) -> list[tuple[tuple[str, int], Sample]]:
        """The samples that have finished since the last call, by request id and index."""
        finished, self.finished = self.finished, {}
        return list(finished.items())


def generate(engine: Engine, requests: list[Request]) -> dict[str, list[Sample]]:
    """The samples of each request, by request id, in order of their index."""
    for request in requests:
        engine.add_request(request)
    collector = Collector()
    while engine.has_unfinished_requests():
        collector.take(engine.step())
    return {r.request_id: [collector.finished[r.request_id, i] for i in range(r.sampling.n)] for r in requests}
