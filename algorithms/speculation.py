"""How much to guess: the size of draft trees by what a pass costs and by how often guesses were right (ours)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# How often a retrieved token is right before anything is known of a sequence, by how long the match was: so often
# where that is not known, or short; with a long one, this much is left of the doubt. So many guesses that counts for.
_PRIOR, _LONG, _DOUBT_LEFT, _TRUST = 0.9, 16, 0.5, 3.0
_MEMORY = 0.9  # what an earlier pass weighs beside the one after it


@dataclass(slots=True)
class Agreement:
    """How often a sequence's next token was among those that a source guessed for it, of late."""

    right: float = 0.0
    tried: float = 0.0

    def rate(self, match_length: int = 0) -> float:
        """How often the next guess will be right, each token of it, if the source found a match of that length."""
        doubt = (1.0 - _PRIOR) * _DOUBT_LEFT ** (min(match_length, _LONG) / _LONG)
        return (self.right + (1.0 - doubt) * _TRUST) / (self.tried + _TRUST)

    def learn(self, num_accepted: int, stopped: float) -> None:
        """So many tokens in a row were right; then `stopped`, in [0, 1], guesses were wrong: 0 if the tree ended."""
        self.forget()
        self.right += num_accepted
        self.tried += num_accepted + stopped

    def forget(self) -> None:
        """A pass without a guess: what is known grows old, so that guessing is tried again some time."""
        self.right *= _MEMORY
        self.tried *= _MEMORY


@dataclass(slots=True)
class Belief:
    """What became of what was promised to a sequence: accepted tokens, of those that its trees' chances came to."""

    accepted: float = 0.0
    promised: float = 0.0

    @property
    def factor(self) -> float:
        """By which chances are believed."""
        return (self.accepted + _TRUST) / (self.promised + _TRUST)

    def learn(self, num_accepted: int, promised: float) -> None:
        self.accepted = _MEMORY * self.accepted + num_accepted
        self.promised = _MEMORY * self.promised + promised


def best_size(likely: np.ndarray, num_sequences: int, num_tokens: int, seconds: np.ndarray, sizes: np.ndarray) -> int:
    """How many of the nodes, whose chances are `likely` `[N]` from the best down, a pass should verify: as many as give
    the most tokens a second.

    The pass draws for `num_sequences` sequences and carries `num_tokens` tokens anyway; `seconds` `[S]` is what passes
    of `sizes` `[S]` tokens take, ascending; what is between them is interpolated, what is beyond is extended.
    """
    counts = np.arange(len(likely) + 1)
    gained = num_sequences + np.append(0.0, np.cumsum(likely))
    total = num_tokens + counts
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    taken = np.interp(total, sizes, seconds) + np.maximum(0, total - sizes[-1]) * slope
    return int(np.argmax(gained / taken))
