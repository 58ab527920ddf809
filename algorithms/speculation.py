"""How much to guess: the size of draft trees by what a pass costs and by how often guesses were right (ours)."""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

from dataclasses import dataclass

from thornback.algorithms.compiled import compiled

# How often a guessed token is right before anything is known of a sequence, and for how many guesses that counts.
_PRIOR, _TRUST = 0.75, 3.0
_MEMORY = 0.9  # what an earlier pass weighs beside the one after it


@dataclass(slots=True)
class Agreement:
    """How often a sequence's next token was among those that a source guessed for it, of late."""

    right: float = 0.0
    tried: float = 0.0

    @property
    def rate(self) -> float:
        """How often the next guess will be right, each token of it."""
        return (self.right + _PRIOR * _TRUST) / (self.tried + _TRUST)

    @property
    def doubt(self) -> float:
        """How much oftener than usual the source is wrong."""
        return (1.0 - self.rate) / (1.0 - _PRIOR)

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


@compiled
def best_size(likely, num_sequences, num_tokens, seconds, sizes):
    """How many of the nodes, whose chances are `likely` `[N]` from the best down, a pass should verify: as many as give
    the most tokens a second.

    The pass draws for `num_sequences` sequences and carries `num_tokens` tokens anyway; `seconds` `[S]` is what passes
    of `sizes` `[S]` tokens take, ascending; what is between them is interpolated, what is beyond is extended.
    """
    best, best_rate, gained, at = 0, 0.0, float(num_sequences), 0
    for count in range(len(likely) + 1):
        if count:
            gained += likely[count - 1]
        total = num_tokens + count
        while at + 2 < len(sizes) and sizes[at + 1] < total:
            at += 1
        share = max(0.0, (total - sizes[at]) / (sizes[at + 1] - sizes[at]))
        rate = gained / (seconds[at] + share * (seconds[at + 1] - seconds[at]))
        if rate > best_rate:
            best, best_rate = count, rate
    return best
