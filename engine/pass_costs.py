"""What passes cost: measured at an engine's start, and corrected by what the passes since then have taken."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

# Tokens of the passes that are timed. Kernels take tokens eight at a time: a ninth costs as much as eight more.
_SIZES = (1, 2, 8, 9, 16, 17, 24, 25, 32, 33, 48, 64, 65, 128, 256)
_LEAST, _MOST, _MEASURE_SECONDS = 4, 32, 0.5  # how often each is timed: more while that takes no longer
_NEW = 0.1  # what a pass weighs beside those of its size before it
_FORGOTTEN = 0.002  # of every correction with every pass, so that sizes that seemed dear are tried again
_EXTREMES = 0.5, 4.0  # of corrections: a pass that something else has held up says nothing of its size
_BETWEEN = np.array([2, 9, 17, 25, 33, 65, 129])  # sizes whose passes are corrected apart begin there

Costs = tuple[tuple[int, float], ...]  # (tokens, seconds): see `SpeculationConfig.costs`


class PassCosts:
    """Seconds of a step by the tokens of its pass. Beyond what is measured, passes are extended in proportion.

    What is measured are passes over short sequences, one after the other. A pass among others reads longer ones, finds
    less in its caches, and has a tree to be laid out and settled: by how much longer it takes is seen as it happens,
    for small and for large passes apart.
    """

    def __init__(self, costs: Costs = ()) -> None:
        """`costs`: what passes cost from now on, whatever they take."""
        self._fixed = bool(costs)
        self._of_sequence = dict(costs).get(0, 0.0)
        self._plain = {-n: seconds for n, seconds in costs if n < 0}  # of steps of n sequences that do not guess
        self._between: dict[int, float] = {}  # of `plain`, as far as it was asked for
        passes = [cost for cost in costs if cost[0] > 0]
        self.sizes, self._seconds = np.array(passes, float).reshape(-1, 2).T.copy()
        self._corrections: dict[int, np.ndarray] = {}  # by the number of sequences, in powers of two

    @classmethod
    def measure(cls, run: Callable[[int], None], max_tokens: int) -> PassCosts:
        """Learn what passes take: `run(n)` is one of n tokens."""
        sizes = [n for n in _SIZES if n <= max(2, max_tokens)]
        seconds = np.full(len(sizes), np.inf)
        started, rounds = time.perf_counter(), 0
        # Round after round, so that what disturbs the machine for a while does not meet one size alone.
        while rounds < _LEAST or (rounds < _MOST and time.perf_counter() - started < _MEASURE_SECONDS):
            seconds = np.minimum(seconds, [_timed(run, n) for n in sizes])
            rounds += 1
        # A pass can take no longer than one of more tokens.
        seconds = np.minimum.accumulate(seconds[::-1])[::-1]
        found = cls(tuple(zip(sizes, seconds.tolist(), strict=True)))
        found._fixed = False
        return found

    def add_overhead(self, steps: dict[int, float], plain: dict[int, float], num_nodes: int) -> None:
        """`steps[n]`: the seconds of a step with n sequences of so many nodes each: what it takes besides its pass.
        `plain[n]`: of one that does not guess."""
        numbers = np.array(sorted(steps))
        passes = np.interp(numbers * (1 + num_nodes), self.sizes, self._seconds)
        overheads = np.maximum(0.0, [steps[n] for n in numbers] - passes)
        if len(numbers) > 1:
            self._of_sequence = max(0.0, (overheads[-1] - overheads[0]) / (numbers[-1] - numbers[0]))
        self._plain, self._between = dict(plain), {}
        self._seconds = self._seconds + max(0.0, overheads[0] - numbers[0] * self._of_sequence)

    def plain(self, num_sequences: int) -> float:
        """Seconds of a step of so many sequences that does not guess; 0 where that is not known."""
        if not self._plain:
            return 0.0
        if num_sequences not in self._between:
            numbers = sorted(self._plain)
            seconds = float(np.interp(num_sequences, numbers, [self._plain[n] for n in numbers]))
            if num_sequences > numbers[-1]:  # by as much longer as its pass takes
                seconds += self.guessed(0, num_sequences) - self.guessed(0, numbers[-1])
            self._between[num_sequences] = seconds
        return self._between[num_sequences]

    def guessed(self, num_sequences: int, num_tokens: int) -> float:
        """Seconds of a step of so many sequences that guesses, and whose pass has so many tokens."""
        return float(np.interp(num_tokens, self.sizes, self._seconds)) + num_sequences * self._of_sequence

    @property
    def listed(self) -> Costs:
        """As (tokens, seconds), without the corrections."""
        plain = ((-n, self._plain[n]) for n in sorted(self._plain))
        of_sequence = ((0, self._of_sequence),) if len(self.sizes) else ()
        passes = zip(self.sizes.tolist(), self._seconds.tolist(), strict=True)
        return (*plain, *of_sequence, *((int(n), seconds) for n, seconds in passes))

    def of(self, num_sequences: int) -> np.ndarray:
        """Seconds of steps with so many sequences, whose passes have `sizes` tokens."""
        seconds = self._seconds + num_sequences * self._of_sequence
        corrections = self._corrections.get(num_sequences.bit_length())
        if corrections is None:
            return seconds
        # What was not seen is believed to be as it was measured, and so is tried.
        return np.maximum.accumulate(seconds * corrections[np.searchsorted(_BETWEEN, self.sizes, side="right")])

    def observe(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """A step of so many sequences and tokens has taken so long."""
        if self._fixed:
            return
        correction = min(max(seconds / self.guessed(num_sequences, num_tokens), _EXTREMES[0]), _EXTREMES[1])
        corrections = self._corrections.setdefault(num_sequences.bit_length(), np.ones(len(_BETWEEN) + 1))
        corrections += _FORGOTTEN * (1.0 - corrections)
        place = int(np.searchsorted(_BETWEEN, num_tokens, side="right"))
        corrections[place] += _NEW * (correction - corrections[place])


def _timed(run: Callable[[int], None], size: int) -> float:
    started = time.perf_counter()
    run(size)
    return time.perf_counter() - started
