"""Whether guessing, and drafting, win: by the tokens and seconds of passes with and without."""

from __future__ import annotations

import numpy as np

_MEMORY = 0.95  # what an earlier pass weighs in a rate
_RUN, _PERIOD = 8, 256  # so many passes in a row try the other way, once in so many
_TRIALS, _TRY_AGAIN = 4, 48  # so many passes with and without a draft before they are compared; one in so many tries


class GuessRate:
    """Whether guessing wins at one load, by what it was seen to win: whatever else it costs is in it."""

    def __init__(self, always: bool = False) -> None:
        self.drafts = self._always = always
        self._tokens, self._seconds = [0.0, 0.0], [0.0, 0.0]  # without and with guessing
        self._passes = self._since_change = 0

    @property
    def rate(self) -> float:
        """Tokens a second, of passes as they go now."""
        way = int(self.drafts)
        return self._tokens[way] / self._seconds[way] if self._seconds[way] else 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A pass gave so many tokens in so many seconds; choose the way of the next one."""
        if self._always:
            return
        way = int(self.drafts)
        if self._since_change:  # the first after a change has to build what others go on with
            self._tokens[way] = _MEMORY * self._tokens[way] + num_tokens
            self._seconds[way] = _MEMORY * self._seconds[way] + seconds
        self._passes += 1
        self._since_change += 1
        if self._since_change > _RUN:
            plain, drafting = (t / s if s else np.inf for t, s in zip(self._tokens, self._seconds, strict=True))
            better = drafting > plain
            if self._passes % _PERIOD < _RUN and self._passes > _PERIOD:
                better = not better
            if better != self.drafts:
                self.drafts, self._since_change = bool(better), 0


class DraftWorth:
    """Whether the draft head is worth its time beside what was retrieved: by the tokens and seconds of passes with and
    without it, where retrieval promised about as much."""

    def __init__(self) -> None:
        self._tokens, self._seconds, self._passes = [0.0, 0.0], [0.0, 0.0], [0, 0]
        self.drafted = self.trying = False

    def choose(self, rate: float) -> bool:
        """Whether to draft, where so many tokens a second come anyway."""
        few = [way for way in (True, False) if self._passes[way] < _TRIALS]
        again = sum(self._passes) % _TRY_AGAIN == 0
        self.trying = bool(few) or again
        if few:
            self.drafted = few[0]
        else:
            gain, cost = (
                self._mean(values, True) - self._mean(values, False) for values in (self._tokens, self._seconds)
            )
            self.drafted = (gain > cost * rate) != again
        return self.drafted

    def _mean(self, values: list[float], way: bool) -> float:
        return values[way] / self._weight(way)

    def _weight(self, way: bool) -> float:
        return (1 - _MEMORY ** self._passes[way]) / (1 - _MEMORY)

    def observe(self, num_tokens: int, seconds: float) -> None:
        way = self.drafted
        self._tokens[way] = _MEMORY * self._tokens[way] + num_tokens
        self._seconds[way] = _MEMORY * self._seconds[way] + seconds
        self._passes[way] += 1
