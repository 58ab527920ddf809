"""What an engine guesses before each pass, and how often it was right (RASD, papers.md section 3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from thornback.algorithms import Agreement, agreement, best_size, fuse, is_tree, likelihoods, subtree
from thornback.contracts import Retriever, SpeculationConfig, SpeculationStats, TokenTree
from thornback.engine.drafter import Drafted, Drafter
from thornback.engine.sequence import Sequence

_log = logging.getLogger(__name__)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens of the passes that are timed
_LEAST, _MOST, _MEASURE_SECONDS = 4, 32, 0.5  # how often each is timed: more while that takes no longer
_MEMORY = 0.95  # what an earlier pass weighs in a rate
_LIKELY = 0.05  # retrieved branches whose first token a draft thinks so likely stay, whatever its other choices
_JUDGES = 0.6  # how often a draft must be right to judge what others say
_RUN, _PERIOD = 8, 256  # so many passes in a row try the other way, once in so many
_TRIALS, _TRY_AGAIN = 4, 48  # so many passes with and without a draft before they are compared; one in so many tries
_PROMISES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of accepted tokens a sequence, between which passes are compared
_LEAST_PROMISE = 0.05  # accepted tokens a sequence for which a draft looks deeper, where its costs are not measured


@dataclass(slots=True)
class _Guess:
    """A tree for a sequence, with each node's chance of being accepted."""

    seq: Sequence
    tree: TokenTree
    chances: np.ndarray


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
        self.drafted = False

    def choose(self, rate: float) -> bool:
        """Whether to draft, where so many tokens a second come anyway."""
        few = [way for way in (True, False) if self._passes[way] < _TRIALS]
        if few:
            self.drafted = few[0]
        else:
            gain, cost = (
                self._mean(values, True) - self._mean(values, False) for values in (self._tokens, self._seconds)
            )
            self.drafted = (gain > cost * rate) != (sum(self._passes) % _TRY_AGAIN == 0)
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
        self._sizes = self._seconds = np.empty(0)
        self._loads: dict[int, _Load] = {}  # by the number of sequences, in powers of two
        self._load: _Load | None = None
        self._worths: dict[tuple[int, int], _Worth] = {}  # by that, and by what retrieval promises
        self._worth: _Worth | None = None
        self._started = 0.0
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = self.num_failures = 0
        self._per_position = [0] * config.num_nodes if self._config and config else []

    @property
    def stats(self) -> SpeculationStats | None:
        """None where nothing is speculated."""
        if self._config is None:
            return None
        counts = (self.num_drafts, self.num_draft_tokens, self.num_accepted_tokens, self.num_failures)
        return SpeculationStats(*counts, tuple(self._per_position))

    def measure(self, run: Callable[[int], None], max_tokens: int) -> None:
        """Learn what passes cost: `run(n)` is one of n tokens."""
        if self._config is None or not self._config.adaptive:
            return
        if self._config.costs:
            self.fix_costs(self._config.costs)
            return
        self._sizes = np.array([n for n in _SIZES if n <= max(2, max_tokens)])
        seconds = np.full(len(self._sizes), np.inf)
        started, rounds = time.perf_counter(), 0
        # Round after round, so that what disturbs the machine for a while does not meet one size alone.
        while rounds < _LEAST or (rounds < _MOST and time.perf_counter() - started < _MEASURE_SECONDS):
            seconds = np.minimum(seconds, [_timed(run, int(n)) for n in self._sizes])
            rounds += 1
        # A pass can take no longer than one of more tokens.
        self._seconds = np.minimum.accumulate(seconds[::-1])[::-1]

    @property
    def costs(self) -> tuple[tuple[int, float], ...]:
        """What passes cost, as (tokens, seconds): given or measured. Empty where nobody asks for it."""
        return tuple((int(n), float(seconds)) for n, seconds in zip(self._sizes, self._seconds, strict=True))

    def fix_costs(self, costs: tuple[tuple[int, float], ...]) -> None:
        """From now on passes cost this, whatever they take: see `SpeculationConfig.costs`."""
        if self._config is not None:
            self._config = replace(self._config, costs=costs)
            self._sizes, self._seconds = np.asarray(costs, np.float64).T
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
            for guess in self._guess_all(eligible, self._config):
                guess.seq.draft = guess.tree
            return
        repeatable = bool(self._config.costs)
        load = self._loads.setdefault(0 if repeatable else len(sequences).bit_length(), _Load(repeatable))
        num_tokens = sum(len(seq.token_ids) - seq.num_computed_tokens for seq in sequences)
        self._load = load if len(sequences) == num_tokens else None  # rates are those of passes that only decode
        self._started = time.perf_counter()
        if load.drafts:
            self._choose(self._guess_all(eligible, self._config), len(sequences), num_tokens)
        for seq in eligible:
            if seq.draft is None:
                for source in seq.agreements:
                    source.forget()

    def observe(self, num_tokens: int) -> None:
        """The pass that was proposed is over, and gave so many tokens."""
        seconds = time.perf_counter() - self._started
        if self._load is not None:
            self._load.observe(num_tokens, seconds)
            if self._worth is not None:
                self._worth.observe(num_tokens, seconds)
        self._load = self._worth = None

    def _choose(self, guesses: list[_Guess], num_sequences: int, num_tokens: int) -> None:
        """The best nodes of all guesses together: as many as make the pass give the most tokens a second."""
        if not guesses:
            return
        every = np.concatenate([guess.chances for guess in guesses])
        order = np.argsort(-every, kind="stable")
        size = best_size(every[order], num_sequences, num_tokens, self._seconds, self._sizes)
        kept, start = np.zeros(len(every), bool), 0
        kept[order[:size]] = True  # a child is never likelier than its parent, and comes after it
        for guess in guesses:
            mine = np.flatnonzero(kept[start : start + len(guess.chances)])
            start += len(guess.chances)
            if len(mine):
                tokens, parents = subtree(guess.tree.tokens, guess.tree.parents, mine)
                guess.seq.draft = TokenTree(tokens, parents, guess.tree.weights[mine])

    def _guess_all(self, sequences: list[Sequence], config: SpeculationConfig) -> list[_Guess]:
        able = []
        for seq in sequences:
            if self._left(seq) > 1:
                self._retrieve(seq, config)
                if seq.speculates:
                    able.append(seq)
        guesses = [self._guess(seq, None, config) for seq in able]
        if self._drafter is not None and able:
            promise = sum(guess.chances.sum() for guess in guesses if guess is not None) / len(able)
            if self._drafts(len(able), promise, config):
                drafts = self._draft(able, self._least_promise(len(able), config))
                guesses = [self._guess(seq, draft, config) for seq, draft in zip(able, drafts, strict=True)]
        return [guess for guess in guesses if guess is not None]

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

    def _draft(self, sequences: list[Sequence], least_promise: float) -> Iterable[Drafted | None]:
        """What the draft head says. If it fails, its sequences go on without guesses."""
        assert self._drafter is not None
        try:
            return self._drafter.propose(sequences, least_promise)
        except Exception as error:
            for seq in sequences:
                self._give_up(seq, error)
            return [None] * len(sequences)

    def _give_up(self, seq: Sequence, error: Exception) -> None:
        """End the guessing for a request, and nothing else."""
        seq.speculates = False
        self.num_failures += 1
        _log.warning("Request %s goes on without speculation: %s", seq.request.request_id, error)

    def _left(self, seq: Sequence) -> int:
        """How many tokens may still be drawn."""
        return min(seq.request.sampling.max_tokens - seq.num_output_tokens, self._max_model_len - len(seq.token_ids))

    def _guess(self, seq: Sequence, draft: Drafted | None, config: SpeculationConfig) -> _Guess | None:
        """What all sources say, as one tree."""
        if not seq.speculates:
            return None
        seq.drafted = None if draft is None else draft.tree
        sources = [] if draft is None else [draft.tree]
        for tree, source in zip(seq.retrieved, seq.agreements, strict=True):
            if not len(tree):
                continue
            rate = source.rate(tree.match_length)
            first, least = np.empty(0, np.float32), 0.0
            if draft is not None and seq.draft_agreement.rate() > _JUDGES:
                first, least = draft.chances(tree.tokens[tree.parents < 0]), min(draft.least, _LIKELY)
            likely = likelihoods(tree.tokens, tree.parents, tree.weights, rate, first, least)
            sources.append((tree.tokens, tree.parents, likely))
        if not sources:
            return None
        columns = [np.concatenate(column) for column in zip(*sources, strict=True)]
        stops = np.cumsum([len(source[0]) for source in sources])
        tokens, parents, likely = fuse(*columns, stops, config.num_nodes, self._left(seq) - 1)
        believed = np.minimum(likely * np.float32(seq.belief.factor), 1.0)
        return _Guess(seq, TokenTree(tokens, parents, likely), believed) if len(tokens) else None

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

    def learn(self, seq: Sequence, draft: TokenTree, path: np.ndarray, drawn: np.ndarray) -> None:
        """A draft was verified, and the model went down `path`; `drawn` as in `verify`."""
        self.num_drafts += 1
        self.num_draft_tokens += len(draft)
        self.num_accepted_tokens += len(path)
        seq.belief.learn(len(path), float(draft.weights.sum()))
        for depth in range(len(path)):
            self._per_position[depth] += 1
        said = drawn[np.append(0, path + 1)]
        for tree, source in zip(seq.retrieved, seq.agreements, strict=False):
            if len(tree):
                right, others = agreement(tree.tokens, tree.parents, said)
                source.learn(right, float(others))
        if seq.drafted is not None:
            right, others = agreement(seq.drafted[0], seq.drafted[1], said)
            seq.draft_agreement.learn(right, float(others))


def _checked(tree: TokenTree, vocab_size: int) -> TokenTree:
    """Raise `ValueError` for a tree that no model can verify."""
    if not len(tree.tokens) == len(tree.parents) == len(tree.weights):
        raise ValueError("a retriever's tree has columns of different lengths.")
    if not is_tree(tree.tokens, tree.parents, vocab_size):
        raise ValueError(
            "a retriever proposes nodes that stand before their parents, or tokens that a vocabulary of "
            f"{vocab_size} does not have."
        )
    return tree


def _timed(run: Callable[[int], None], size: int) -> float:
    started = time.perf_counter()
    run(size)
    return time.perf_counter() - started
