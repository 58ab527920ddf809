"""Requests over time: drawn, or read from a file in Mooncake's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: seconds from the beginning, tokens of its prompt and of its answer."""

    time: float
    num_tokens: int
    num_outputs: int


Lengths = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def _lognormal(rng: np.random.Generator, count: int, median: float, spread: float, most: int) -> np.ndarray:
    return np.clip(np.exp(rng.normal(np.log(median), spread, count)), 4, most).astype(int)


def chat(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Short questions, long answers."""
    return _lognormal(rng, count, 300, 0.8, 4000), _lognormal(rng, count, 400, 0.6, 1500)


def longbench(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents and short answers, with the lengths that LongBench states: 2,000 to 16,000 tokens, most about 7,000."""
    return _lognormal(rng, count, 7000, 0.5, 16_000), _lognormal(rng, count, 90, 0.6, 500)


def mixed(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Half of each."""
    first, second = chat(rng, count), longbench(rng, count)
    pick = rng.random(count) < 0.5
    return np.where(pick, first[0], second[0]), np.where(pick, first[1], second[1])


LENGTHS: dict[str, Lengths] = {"chat": chat, "longbench": longbench, "mixed": mixed}


def poisson(lengths: str, rate: float, seconds: float, seed: int, bursts: float = 1.0) -> list[Arrival]:
    """`rate` requests a second on average. `bursts`: in 5 of every 30 seconds so many times as many as in others."""
    rng = np.random.default_rng(seed)
    calm = rate * 30 / (25 + 5 * bursts)
    times, now = [], 0.0
    while now < seconds:
        now += rng.exponential(1 / (calm * max(bursts, 1.0)))
        if now < seconds and rng.random() < (bursts if now % 30 < 5 else 1.0) / max(bursts, 1.0):
            times.append(now)
    prompts, answers = LENGTHS[lengths](rng, len(times))
    return [Arrival(*of) for of in zip(times, prompts.tolist(), answers.tolist(), strict=True)]


def shifting(rate: dict[str, float], seconds: float, period: float, seed: int) -> list[Arrival]:
    """Kinds of requests that take turns, each for `period` seconds, at a rate of its own."""
    kinds, found = list(rate), []
    for number in range(int(np.ceil(seconds / period))):
        kind = kinds[number % len(kinds)]
        part = poisson(kind, rate[kind], min(period, seconds - number * period), seed + number)
        found += [Arrival(a.time + number * period, a.num_tokens, a.num_outputs) for a in part]
    return found


def read_mooncake(path: str | Path, speed: float = 1.0) -> list[Arrival]:
    """A trace as Mooncake publishes them: JSON lines with `timestamp` in milliseconds, `input_length` and
    `output_length`. `speed`: how much faster the requests come. Raises `ValueError` for a line that is none."""
    return sorted(_mooncake_lines(path, speed), key=lambda a: a.time)


def _mooncake_lines(path: str | Path, speed: float) -> Iterator[Arrival]:
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                yield Arrival(row["timestamp"] / 1000 / speed, int(row["input_length"]), int(row["output_length"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is no request of a Mooncake trace: {error!r}") from error
