"""What an engine guesses before each pass, and how often it was right (RASD, papers.md section 3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from thornback.algorithms import (
    Agreement,
    agree_all,
    choose,
    fuse_all,
    is_tree,
    likelihoods,
    verify_all,
)
from thornback.contracts import Retriever, SpeculationConfig, SpeculationStats, TokenTree
from thornback.engine.drafter import Drafted, Drafter
from thornback.engine.pass_costs import Costs, PassCosts
from thornback.engine.sequence import Sequence

_log = logging.getLogger(__name__)
_MEMORY = 0.95  # what an earlier pass weighs in a rate
_LIKELY = 0.05  # retrieved branches whose first token a draft thinks so likely stay, whatever its other choices
_JUDGES = 0.6  # how often a draft must be right to judge what others say
_RUN, _PERIOD = 8, 256  # so many passes in a row try the other way, once in so many
_TRIALS, _TRY_AGAIN = 4, 48  # so many passes with and without a draft before they are compared; one in so many tries
_PROMISES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of accepted tokens a sequence, between which passes are compared
TRIAL_NODES = 4  # of trees that are only tried, to see what a step takes
_CHANCES = -1  # in place of a match: weights are chances already
_T = TypeVar("_T")
_Tree = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens int32, parents int32, and chances or weights float32
_NO_TREE: _Tree = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
_LEAST_PROMISE = 0.05  # accepted tokens a sequence for which a draft looks deeper, where its costs are not measured


@dataclass(slots=True)
class _Guesses:
    """A tree for each of some sequences, one behind the other, up to `stops` `[S]`: int32, int32, and each node's
    chance of being accepted, float32."""

    sequences: list[Sequence]
    tokens: np.ndarray
    parents: np.ndarray
    chances: np.ndarray
    stops: np.ndarray

    def beliefs(self) -> np.ndarray:
        """What chances are worth, of each sequence's tree."""
        return np.array([seq.belief.factor for seq in self.sequences])

    def propose(self) -> None:
        """Let these trees be verified."""
        start = 0
        for seq, stop in zip(self.sequences, self.stops.tolist(), strict=True):
            if stop > start:
                seq.draft = TokenTree(self.tokens[start:stop], self.parents[start:stop], self.chances[start:stop])
            start = stop


class _Load:
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


class _Worth:
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


class Speculation:
    """Gives the sequences that decode their drafts, and counts what vLLM's metrics count."""

    def __init__(
        self,
        config: SpeculationConfig | None,
        retrievers: tuple[Retriever, ...],
        drafter: Drafter | None,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self._config = config if retrievers or drafter else None
        self._retrievers, self._drafter = retrievers, drafter
        self._max_model_len, self._vocab_size = max_model_len, vocab_size
        self._costs = PassCosts()
        self._loads: dict[int, _Load] = {}  # by the number of sequences, in powers of two
        self._load: _Load | None = None
        self._worths: dict[tuple[int, int], _Worth] = {}  # by that, and by what retrieval promises
        self._worth: _Worth | None = None
        self._started = self._drafting = 0.0  # when a pass began, and how long the draft took in it
        self._shape = 0, 0  # sequences and tokens of that pass
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = self.num_failures = 0
        self._per_position = np.zeros(config.num_nodes if config else 0, np.int64)

    @property
    def stats(self) -> SpeculationStats | None:
        """None where nothing is speculated."""
        if self._config is None:
            return None
        counts = (self.num_drafts, self.num_draft_tokens, self.num_accepted_tokens, self.num_failures)
        return SpeculationStats(*counts, tuple(self._per_position.tolist()))

    def measure(self, run: Callable[[int], None], max_tokens: int) -> None:
        """Learn what passes cost: `run(n)` is one of n tokens."""
        if self._config is None or not self._config.adaptive:
            return
        if self._config.costs:
            self.fix_costs(self._config.costs)
            return
        self._costs = PassCosts.measure(run, max_tokens)

    def trial(self) -> Speculation | None:
        """What guesses as this does, but always, and without a draft head, whose time is counted apart: to learn what a
        step takes besides its pass. None where that is not asked for, or known."""
        if self._config is None or not self._config.adaptive or self._config.costs:
            return None
        config = replace(self._config, adaptive=False, max_sequences=None, num_nodes=TRIAL_NODES)
        return Speculation(config, (*self._retrievers, _Nonsense()), None, self._max_model_len, self._vocab_size)

    def add_overhead(self, steps: dict[int, float]) -> None:
        """`steps[n]`: the seconds of a step of the `trial` with n sequences, `TRIAL_NODES` nodes each."""
        self._costs.add_overhead(steps, TRIAL_NODES)

    @property
    def costs(self) -> Costs:
        """What passes cost, as (tokens, seconds): given or measured. Empty where nobody asks for it."""
        return self._costs.listed

    def fix_costs(self, costs: Costs) -> None:
        """From now on passes cost this, whatever they take: see `SpeculationConfig.costs`."""
        if self._config is not None:
            self._config = replace(self._config, costs=costs)
            self._costs = PassCosts(costs)
            self._loads.clear()
            self._worths.clear()

    def propose(self, sequences: list[Sequence]) -> None:
        """Give each sequence whose next pass draws one token the tree to be verified in it, if that is worth it."""
        if self._config is None:
            return
        for seq in sequences:
            seq.draft = None  # one that found no room in its pass is old by now
        self._load = self._worth = None
        if self._config.max_sequences is not None and len(sequences) > self._config.max_sequences:
            return
        # A grammar allows after each node what only it knows: such sequences go on token by token.
        able = [s for s in sequences if s.grammar is None and s.speculates]
        eligible = [s for s in able if len(s.token_ids) - s.num_computed_tokens == 1]
        if not self._config.adaptive:
            self._guess(eligible, self._config).propose()
            return
        repeatable = bool(self._config.costs)
        load = self._loads.setdefault(0 if repeatable else len(sequences).bit_length(), _Load(repeatable))
        num_tokens = sum(len(seq.token_ids) - seq.num_computed_tokens for seq in sequences)
        self._load = load if len(sequences) == num_tokens else None  # rates are those of passes that only decode
        self._started, self._drafting = time.perf_counter(), 0.0
        self._shape = len(sequences), num_tokens
        if load.drafts:
            guesses = self._chosen(self._guess(eligible, self._config), len(sequences), num_tokens)
            guesses.propose()
            self._shape = len(sequences), num_tokens + len(guesses.tokens)
        for seq in eligible:
            if seq.draft is None:
                for source in seq.agreements:
                    source.forget()

    def observe(self, num_tokens: int) -> None:
        """The pass that was proposed is over, and gave so many tokens."""
        seconds = time.perf_counter() - self._started
        if self._load is not None:
            if self._worth is None or not self._worth.trying:  # a try says nothing of what is usual
                self._load.observe(num_tokens, seconds)
            self._costs.observe(*self._shape, seconds - self._drafting)
            if self._worth is not None:
                self._worth.observe(num_tokens, seconds)
        self._load = self._worth = None

    def _chosen(self, guesses: _Guesses, num_sequences: int, num_tokens: int) -> _Guesses:
        """The best nodes of all guesses together: as many as make the pass give the most tokens a second."""
        columns = guesses.tokens, guesses.parents, guesses.chances, guesses.stops
        costs = self._costs.of(num_sequences), self._costs.sizes
        return _Guesses(guesses.sequences, *choose(*columns, guesses.beliefs(), num_sequences, num_tokens, *costs))

    def _guess(self, sequences: list[Sequence], config: SpeculationConfig) -> _Guesses:
        able = []
        for seq in sequences:
            if self._left(seq) > 1:
                self._retrieve(seq, config)
                if seq.speculates:
                    able.append(seq)
        guesses = self._fused(able, [None] * len(able), config)
        if self._drafter is not None and able:
            beliefs = np.repeat(guesses.beliefs(), np.diff(guesses.stops, prepend=0))
            promise = float(np.minimum(guesses.chances * beliefs, 1.0).sum()) / len(able)
            if self._drafts(len(able), promise, config):
                drafts = self._draft(able, self._least_promise(len(able), config))
                guesses = self._fused(able, drafts, config)
        return guesses

    def _drafts(self, num_sequences: int, promise: float, config: SpeculationConfig) -> bool:
        """Whether to ask the draft head, where retrieval promises so many accepted tokens a sequence."""
        if self._load is None or not config.adaptive or config.costs:
            return True
        key = (num_sequences.bit_length(), int(np.searchsorted(_PROMISES, promise)))
        self._worth = self._worths.setdefault(key, _Worth())
        return self._worth.choose(self._load.rate)

    def _least_promise(self, num_sequences: int, config: SpeculationConfig) -> float:
        """The accepted tokens in all that must be in sight for a draft to look a level deeper."""
        assert self._drafter is not None
        if not config.adaptive:
            return 0.0
        if self._load is None or config.costs:
            return _LEAST_PROMISE * num_sequences
        return self._drafter.level_seconds(num_sequences) * self._load.rate

    def _draft(self, sequences: list[Sequence], least_promise: float) -> list[Drafted | None]:
        """What the draft head says. If it fails, its sequences go on without guesses."""
        assert self._drafter is not None
        started = time.perf_counter()
        try:
            return self._drafter.propose(sequences, least_promise)
        except Exception as error:
            for seq in sequences:
                self._give_up(seq, error)
            return [None] * len(sequences)
        finally:
            self._drafting += time.perf_counter() - started

    def guard(self, seq: Sequence, read: Callable[[Sequence], _T], otherwise: _T) -> _T:
        """What the draft says to `read(seq)`, outside of its proposals; `otherwise` if it fails, or has failed."""
        try:
            return read(seq) if seq.speculates else otherwise
        except Exception as error:
            self._give_up(seq, error)
            return otherwise

    def _give_up(self, seq: Sequence, error: Exception) -> None:
        """End the guessing for a request, and nothing else."""
        seq.speculates = False
        self.num_failures += 1
        _log.warning("Request %s goes on without speculation: %s", seq.request.request_id, error)

    def _left(self, seq: Sequence) -> int:
        """How many tokens may still be drawn."""
        return min(seq.request.sampling.max_tokens - seq.num_output_tokens, self._max_model_len - len(seq.token_ids))

    def _fused(self, sequences: list[Sequence], drafts: list[Drafted | None], config: SpeculationConfig) -> _Guesses:
        """What all sources say of each sequence, as one tree."""
        sources: list[_Tree] = []
        matches: list[int] = []
        doubts: list[float] = []
        stops: list[int] = []
        for seq, draft in zip(sequences, drafts, strict=True):
            seq.drafted = None if draft is None else draft.tree
            if draft is not None:
                sources.append(draft.tree)
                matches.append(_CHANCES)
                doubts.append(0.0)
            judges = draft is not None and seq.draft_agreement.rate > _JUDGES
            for tree, source in zip(seq.retrieved, seq.agreements, strict=True) if seq.speculates else ():
                match, weights = tree.match_length, tree.weights
                if draft is not None and judges:
                    first = draft.chances(tree.tokens[tree.parents < 0])
                    least = min(draft.least, _LIKELY)
                    columns = tree.tokens, tree.parents, weights
                    match, weights = _CHANCES, likelihoods(*columns, match, source.doubt, first, least)
                sources.append((tree.tokens, tree.parents, weights))
                matches.append(match)
                doubts.append(source.doubt)
            stops.append(len(sources))
        columns, ends = _end_to_end(sources)
        limits = config.num_nodes, np.array([self._left(seq) - 1 for seq in sequences], np.int64)
        believed = np.array(matches, np.int64), np.array(doubts, np.float64)  # of these types also where there are none
        return _Guesses(sequences, *fuse_all(*columns, *believed, ends, np.array(stops, np.int64), *limits))

    def _retrieve(self, seq: Sequence, config: SpeculationConfig) -> None:
        """Ask the retrievers."""
        context = seq.context()[-config.max_lookback :]
        try:
            trees = (retriever.retrieve(context, config.num_nodes) for retriever in self._retrievers)
            seq.retrieved = [_checked(tree, self._vocab_size) for tree in trees]
        except Exception as error:
            seq.retrieved = []
            self._give_up(seq, error)
        if not seq.agreements:
            seq.agreements = [Agreement() for _ in self._retrievers]

    def settle(self, drafts: list[tuple[Sequence, TokenTree]], drawn: np.ndarray, rows: list[int]) -> list[list[int]]:
        """The nodes of each sequence's draft that the model agrees with, from the root down. What it drew after the
        sequence's last token is at its row of `drawn`; what it drew after the draft's nodes follows."""
        (tokens, parents, chances), stops = _end_to_end([(t.tokens, t.parents, t.weights) for _, t in drafts])
        at = np.array(rows, np.int64)
        paths, ends = verify_all(tokens, parents, stops, drawn, at)
        self._learn([seq for seq, _ in drafts], (drawn, at, paths, ends))
        lengths = np.diff(ends, prepend=0)
        promised = np.add.reduceat(chances, np.append(0, stops[:-1]))
        self.num_drafts += len(drafts)
        self.num_draft_tokens += len(tokens)
        self.num_accepted_tokens += len(paths)
        self._per_position += (np.arange(len(self._per_position))[:, None] < lengths).sum(-1)
        for (seq, _), length, promise in zip(drafts, lengths.tolist(), promised.tolist(), strict=True):
            seq.belief.learn(length, promise)
        flat = paths.tolist()
        return [flat[start:end] for start, end in pairwise([0, *ends.tolist()])]

    def _learn(self, sequences: list[Sequence], said: tuple[np.ndarray, ...]) -> None:
        """How far each source went along with what was said: see `agree_all`."""
        sources: list[_Tree] = []
        learners: list[Agreement] = []
        counts: list[int] = []
        for seq in sequences:
            for tree, agreement in zip(seq.retrieved, seq.agreements, strict=False):
                if len(tree):
                    sources.append((tree.tokens, tree.parents, tree.weights))
                    learners.append(agreement)
            if seq.drafted is not None:
                sources.append(seq.drafted)
                learners.append(seq.draft_agreement)
            counts.append(len(sources))
        (tokens, parents, _), stops = _end_to_end(sources)
        results = agree_all(tokens, parents, stops, np.array(counts, np.int64), *said)
        for learner, (right, others) in zip(learners, results.tolist(), strict=True):
            learner.learn(right, float(others))


class _Nonsense:
    """A retriever that is always there, and nearly always wrong."""

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        chain = np.arange(num_nodes, dtype=np.int32)
        return TokenTree(0 * chain, chain - 1, np.ones(num_nodes, np.float32))


def _end_to_end(trees: list[_Tree]) -> tuple[_Tree, np.ndarray]:
    """All trees in one's columns, and where each ends, int64."""
    tokens, parents, weights = (np.concatenate(column) for column in zip(_NO_TREE, *trees, strict=True))
    return (tokens, parents, weights), np.cumsum([len(tree[0]) for tree in trees], dtype=np.int64)


def _checked(tree: TokenTree, vocab_size: int) -> TokenTree:
    """Raise `ValueError` for a tree that no model can verify."""
    if not len(tree.tokens) == len(tree.parents) == len(tree.weights):
        raise ValueError("a retriever's tree has columns of different lengths.")
    if not (tree.tokens.dtype == tree.parents.dtype == np.int32 and tree.weights.dtype == np.float32):
        columns = (np.asarray(tree.tokens, np.int32), np.asarray(tree.parents, np.int32))
        tree = TokenTree(*columns, np.asarray(tree.weights, np.float32), tree.match_length)
    if not is_tree(tree.tokens, tree.parents, vocab_size):
        raise ValueError(
            "a retriever proposes nodes that stand before their parents, or tokens that a vocabulary of "
            f"{vocab_size} does not have."
        )
    return tree
