"""What an engine's steps take, tried while it is idle: with guesses, and without."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from thornback.contracts import Request, SamplingParams

if TYPE_CHECKING:
    from thornback.engine.speculation import Speculation
    from thornback.engine.torch_engine import TorchEngine
    from thornback.engine.vllm_engine import VllmEngine

_NUMBERS, _TOKENS = (1, 8), 24  # sequences whose steps are tried, and tokens of each
_ROUNDS, _LEAST = 5, 4  # as often, and steps of each kind that are timed, at least,
_SECONDS = 0.5  # however long they take: once that is over, no more


def time_steps(
    engine: TorchEngine | VllmEngine, trials: tuple[Speculation, Speculation, Speculation]
) -> list[dict[int, float]]:
    """Seconds of steps of some numbers of sequences, with guesses and without; `trials`: as `Speculation.trials`."""
    speculation, numbers = engine.speculation, [n for n in _NUMBERS if n <= engine.config.max_num_seqs]
    everything, guessing, plain = trials
    found: list[dict[int, float]] = [{}, {}]
    try:
        engine.speculation = everything
        for n in numbers:
            _try(engine, n)
        started = time.perf_counter()
        # Round after round, so that what disturbs the machine for a while does not meet all of them.
        for _ in range(_ROUNDS):
            for engine.speculation, seconds in zip((guessing, plain), found, strict=True):
                for n in numbers:
                    seconds[n] = min(_try(engine, n), seconds.get(n, np.inf))
            if time.perf_counter() - started > _SECONDS:
                break
    finally:
        engine.speculation = speculation
    return found


def _try(engine: TorchEngine | VllmEngine, num_sequences: int) -> float:
    """The seconds of a step of so many sequences, the median."""
    sampling = SamplingParams(max_tokens=min(_TOKENS, engine.max_model_len - 1), ignore_eos=True, seed=0)
    names = [f"trial-{number}" for number in range(num_sequences)]
    for number, name in enumerate(names):
        engine.add_request(Request(name, (number % engine.vocab_size,), sampling))
    seconds: list[float] = []
    while engine.has_unfinished_requests():
        if len(seconds) >= _LEAST and sum(seconds) > _SECONDS:
            for name in names:
                engine.abort_request(name)
            break
        started = time.perf_counter()
        if len(engine.step()) == num_sequences:
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) if seconds else 0.0
