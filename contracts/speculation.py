"""Speculation: what a retriever or a draft model proposes as the tokens that may come next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from thornback.contracts.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Continuations of one sequence that begin alike, merged: a trie under the sequence's last token. `match_length`:
    behind how many of the sequence's last tokens a retrieval found them; 0 if that is not known.

    Node i carries `tokens[i]` and stands under node `parents[i]` (-1: directly under the last token); parents come
    before their children, and no two children of a node carry the same token. `weights[i]`: of a draft, the
    probability of the path to i; of a retrieval, the number of continuations through i. Arrays of N: int32, int32,
    float32.
    """

    tokens: np.ndarray
    parents: np.ndarray
    weights: np.ndarray
    match_length: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def empty(cls) -> TokenTree:
        return cls(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


@dataclass(frozen=True, slots=True)
class TokenForest:
    """The trees of S sequences, one behind the other: that of sequence s ends before node `stops[s]`. `columns` int32
    `[3, N]`: tokens, parents (counted within each tree), and the bits of the float32 weights; `stops` and
    `match_lengths` int64 `[S]`."""

    columns: np.ndarray
    stops: np.ndarray
    match_lengths: np.ndarray

    @classmethod
    def of(cls, trees: Sequence[TokenTree]) -> TokenForest:
        stops = np.cumsum([len(tree) for tree in trees], dtype=np.int64)
        columns = np.empty((3, int(stops[-1]) if len(trees) else 0), np.int32)
        for tree, stop in zip(trees, stops.tolist(), strict=True):
            start = stop - len(tree)
            columns[0, start:stop], columns[1, start:stop] = tree.tokens, tree.parents
            columns[2, start:stop] = np.asarray(tree.weights, np.float32).view(np.int32)
        return cls(columns, stops, np.array([tree.match_length for tree in trees], np.int64))


class Retriever(Protocol):
    """A store of token sequences that were seen before. Must be safe to ask from several threads."""

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        """What followed the longest suffix of `context` (int64 `[T]`, the last tokens of a sequence; it is only lent)
        in the store: at most `num_nodes` nodes, the most frequent ones. Empty where nothing matches."""
        ...


@runtime_checkable
class BatchRetriever(Retriever, Protocol):
    """One that is asked for all sequences of a pass at once, which costs less than asking for each."""

    def retrieve_all(self, tokens: np.ndarray, stops: np.ndarray, num_nodes: int) -> TokenForest:
        """As `retrieve`, for S contexts that lie one behind the other in `tokens` int64, up to `stops` int64 `[S]`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """`num_nodes`: how many tokens, at most 63, a pass verifies for a sequence besides its next one; fewer where a pass
    of that many tokens costs more than it wins, unless `adaptive` is off. `max_lookback`: how many of its last tokens
    retrievers see. `draft`: the directory of a draft head, or the directory or hub name of a small model with the same
    tokenizer and vocabulary; "": none. Its tree is `draft_depth` tokens deep, and of each level's nodes the
    `draft_top_k` likeliest are looked behind, as many tokens each.

    `costs`: what steps that guess take, as (tokens of the pass, seconds), ascending; with 0 tokens, what each sequence
    adds to that; with -n, what a step of n sequences takes that does not guess (none: all guess). They are measured at
    an engine's start, and rates go on being measured, unless they are given here: then a sequence's trees are a
    function of what was generated and retrieved alone, which makes runs repeatable to the last bit. `max_sequences`:
    guess only while no more sequences run than that; None: however many.
    """

    num_nodes: int = 32
    adaptive: bool = True
    max_lookback: int = 4096
    draft: str = ""
    draft_depth: int = 6
    draft_top_k: int = 8
    costs: tuple[tuple[int, float], ...] = ()
    max_sequences: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= 63:
            raise ConfigError(f"num_nodes is {self.num_nodes}, but must be between 1 and 63.")
        if self.draft_depth < 1 or self.draft_top_k < 1 or self.draft_depth * self.draft_top_k > 63:
            raise ConfigError("draft_depth times draft_top_k must be between 1 and 63.")
        passes = [cost for cost in self.costs if cost[0] > 0]
        if self.costs and not (len(passes) > 1 and passes == sorted(passes)):
            raise ConfigError("costs must be two or more pairs (tokens, seconds) that ascend.")


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What an engine has speculated since its start: `num_drafts` trees of `num_draft_tokens` nodes, of which
    `num_accepted_tokens` were right, `per_position[i]` of them i + 1 tokens after a sequence's last; and `num_failures`
    requests for which a retriever or the draft model failed."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_failures: int
    per_position: tuple[int, ...]

    def since(self, earlier: SpeculationStats) -> SpeculationStats:
        """What came after `earlier`."""
        pairs = zip(self.per_position, earlier.per_position, strict=True)
        return SpeculationStats(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            self.num_failures - earlier.num_failures,
            tuple(now - before for now, before in pairs),
        )
