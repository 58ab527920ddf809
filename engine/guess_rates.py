"""Whether guessing, and drafting, win: by the tokens and seconds of passes with and without."""

from __future__ import annotations

import numpy as np

_MEMORY = 0.95  # what an earlier pass weighs in a rate
_RUN = 8  # so many passes in a row try the other way
_PERIOD, _SELDOM = 256, 4096  # after so many, at first, and at last
_REST = 64  # steps without a guess after which it is tried again, where what steps take is known
_TRIALS = 4  # so many passes with and without a draft before they are compared
_TRY_AGAIN, _RARELY = 48, 768  # after so many the other way is tried, at first, and at last


class GuessRate:
    """Whether guessing wins at one load, by what it was seen to win: whatever else it costs is in it."""

    def __init__(self) -> None:
        self.drafts = False
        self._tokens, self._seconds = [0.0, 0.0], [0.0, 0.0]  # without and with guessing
        self._passes = self._since_change = 0
        self._better: bool | None = None  # whether to guess, when it was last asked
        self._every = self._next = _PERIOD

    @property
    def rate(self) -> float:
        """Tokens a second, of passes as they go now."""
        way = int(self.drafts)
        return self._tokens[way] / self._seconds[way] if self._seconds[way] else 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A pass gave so many tokens in so many seconds; choose the way of the next one."""
        way = int(self.drafts)
        if self._since_change:  # the first after a change has to build what others go on with
            self._tokens[way] = _MEMORY * self._tokens[way] + num_tokens
            self._seconds[way] = _MEMORY * self._seconds[way] + seconds
        self._passes += 1
        self._since_change += 1
        if self._since_change > _RUN:
            plain, drafting = (t / s if s else np.inf for t, s in zip(self._tokens, self._seconds, strict=True))
            better = bool(drafting > plain)
            if better != self._better:
                self._better, self._every = better, _PERIOD
                self._next = self._passes + self._every
            trying = self._passes >= self._next
            if trying:  # the longer it has been so, the rarer
                self._every = min(2 * self._every, _SELDOM)
                self._next = self._passes + self._every
            if (better != trying) != self.drafts:
                self.drafts, self._since_change = better != trying, 0


class KnownRate:
    """The same where it is known what steps take, so that it depends on nothing else what is guessed: what guessing
    wins is all that is to be learned, and is tried again some time after it has not won enough."""

    def __init__(self) -> None:
        self.drafts = True
        self._tokens = self._seconds = 0.0
        self._passes = 0

    def observe(self, num_tokens: int, seconds: float, plain_rate: float) -> None:
        """A step gave so many tokens in so many seconds, where so many tokens a second come without guessing."""
        self._passes += 1
        if self.drafts:
            self._tokens = _MEMORY * self._tokens + num_tokens
            self._seconds = _MEMORY * self._seconds + seconds
            if self._passes >= _RUN and self._tokens < plain_rate * self._seconds:
                self.drafts, self._passes = False, 0
        elif self._passes == _REST:
            self.drafts, self._passes, self._tokens, self._seconds = True, 0, 0.0, 0.0


class DraftWorth:
    """Whether the draft head is worth its time beside what was retrieved: by the tokens and seconds of passes with and
    without it, where retrieval promised about as much."""

    def __init__(self) -> None:
        self._tokens, self._seconds, self._passes = [0.0, 0.0], [0.0, 0.0], [0, 0]
        self.drafted = self.trying = False
        self._better: bool | None = None  # whether to draft, when it was last asked; and after how many passes, and at
        self._every = self._next = _TRY_AGAIN  # which, the other way is tried

    def choose(self, rate: float) -> bool:
        """Whether to draft, where so many tokens a second come anyway."""
        few = [way for way in (True, False) if self._passes[way] < _TRIALS]
        if few:
            self.trying, self.drafted = True, few[0]
            return self.drafted
        gain, cost = (self._mean(values, True) - self._mean(values, False) for values in (self._tokens, self._seconds))
        better, passes = bool(gain > cost * rate), sum(self._passes)
        if better != self._better:
            self._better, self._every = better, _TRY_AGAIN
            self._next = passes + self._every
        self.trying = passes >= self._next
        if self.trying:  # the longer it has been so, the rarer
            self._every = min(2 * self._every, _RARELY)
            self._next = passes + self._every
        self.drafted = better != self.trying
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
