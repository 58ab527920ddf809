"""What an engine guesses before each pass, and how often it was right (RASD, papers.md section 3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from thornback.algorithms import (
    FORGETTING,
    are_trees,
    chains,
    choose,
    fuse_all,
    join,
    learn_all,
    promise_of,
    record_size,
    rests,
    sizes_of,
    verify_all,
)
from thornback.contracts import (
    Retriever,
    SpeculationConfig,
    SpeculationStats,
    TokenForest,
    TokenTree,
)
from thornback.engine.drafter import Drafted, Drafter
from thornback.engine.guess_rates import DraftWorth, GuessRate, KnownRate
from thornback.engine.pass_costs import Costs, PassCosts
from thornback.engine.scheduler import Scheduled
from thornback.engine.sequence import Sequence

_log = logging.getLogger(__name__)
_PROMISES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of accepted tokens a sequence, between which passes are compared
_GUESSES = 16  # for a sequence, among which the time is divided in which the draft has read its prompt
_HELD_UP = 4.0  # times what is expected: a pass that takes longer was held up by something else
_MOST_GAIN = 2.0  # tokens a sequence that a draft adds to what was retrieved, at most, it is assumed
TRIAL_NODES = 4  # of trees that are only tried, to see what a step takes
_WIDTH = 4  # nodes of the tree from which a chain is chosen, for each of the chain's
_LEAST_PROMISE = 0.05  # accepted tokens a sequence for which a draft looks deeper, where its costs are not measured
_T = TypeVar("_T")


@dataclass(slots=True)
class Guesses:
    """A tree for each of some sequences, one behind the other, up to `stops` `[S]`: tokens and parents int32, and each
    node's chance of being accepted, float32. `slots` `[S]`: where what is known of the sequences is; `columns` and
    `ends`: what all sources said of them (`algorithms.forests`)."""

    sequences: list[Sequence]
    slots: np.ndarray
    columns: np.ndarray
    ends: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    chances: np.ndarray
    stops: np.ndarray

    @property
    def trees(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.tokens, self.parents, self.chances, self.stops

    def take(self, tokens: np.ndarray, parents: np.ndarray, chances: np.ndarray, stops: np.ndarray) -> None:
        self.tokens, self.parents, self.chances, self.stops = tokens, parents, chances, stops

    def propose(self) -> None:
        """Say to the scheduler how many nodes there are for each sequence."""
        for seq, count in zip(self.sequences, sizes_of(self.stops).tolist(), strict=True):
            seq.num_draft_tokens = count

    def keep(self, batch: list[Scheduled]) -> None:
        """Drop the trees for which a pass had no room."""
        if sum(item.num_draft_tokens for item in batch) == len(self.tokens):
            return
        found = {id(item.seq) for item in batch if item.num_draft_tokens}
        kept, counts = np.array([id(seq) in found for seq in self.sequences], bool), sizes_of(self.stops)
        nodes = np.repeat(kept, counts)
        self.take(self.tokens[nodes], self.parents[nodes], self.chances[nodes], np.cumsum(counts * kept))

    def shorten(self, counts: np.ndarray) -> None:
        """Of each sequence's chain keep the first tokens, so many `[S]`."""
        sizes = sizes_of(self.stops)
        place = np.arange(len(self.tokens)) - np.repeat(self.stops - sizes, sizes)
        nodes = place < np.repeat(counts, sizes)
        self.take(self.tokens[nodes], self.parents[nodes], self.chances[nodes], np.cumsum(counts))


class Speculation:
    """Gives the sequences that decode their drafts, and counts what vLLM's metrics count."""

    def __init__(
        self,
        config: SpeculationConfig | None,
        retrievers: tuple[Retriever, ...],
        drafter: Drafter | None,
        max_model_len: int,
        vocab_size: int,
        verifies_trees: bool = True,
    ) -> None:
        """Where no trees can be verified, the best chain of each is, of at most `config.num_nodes` tokens."""
        self._config = config if retrievers or drafter else None
        self._verifies_trees = verifies_trees
        self._retrievers, self._drafter = retrievers, drafter
        self._max_model_len, self._vocab_size = max_model_len, vocab_size
        self._costs = PassCosts()
        self._records = np.zeros((0, record_size(1 + len(retrievers))))  # of sequences, and the rows that are free
        self._free: list[int] = []
        # A draft that says nothing, of so many sequences.
        self._nothing: dict[int, tuple[TokenForest, np.ndarray, np.ndarray]] = {}
        self.guesses: Guesses | None = None  # for the coming pass
        self._loads: dict[int, GuessRate | KnownRate] = {}  # by the number of sequences, in powers of two
        self._load: GuessRate | KnownRate | None = None
        self._worths: dict[tuple[int, int], DraftWorth] = {}  # by that, and by what retrieval promises
        self._worth: DraftWorth | None = None
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

    def trials(self) -> tuple[Speculation, Speculation, Speculation] | None:
        """What guesses as this does, but always: to be run once, since what is used for the first time takes its time;
        the same without a draft, whose time is counted apart; and what never guesses: to learn what a step takes
        besides its pass. None where that is not asked for, or known."""
        if self._config is None or not self._config.adaptive or self._config.costs:
            return None
        config, retrievers = replace(self._config, max_sequences=None), (*self._retrievers, _Nonsense())
        few = replace(config, adaptive=False, num_nodes=TRIAL_NODES)
        of_model = self._max_model_len, self._vocab_size, self._verifies_trees
        everything = Speculation(config, retrievers, self._drafter, *of_model)
        everything.fix_costs(((1, 1.0), (64, 1.0)))  # every guess is worth it
        return everything, Speculation(few, retrievers, None, *of_model), Speculation(None, (), None, *of_model)

    def add_overhead(self, steps: dict[int, float], plain: dict[int, float]) -> None:
        """`steps[n]`: the seconds of a step of the trial with n sequences, `TRIAL_NODES` nodes each; `plain[n]`: of
        one without."""
        self._costs.add_overhead(steps, plain, TRIAL_NODES)

    @property
    def costs(self) -> Costs:
        """What steps cost, given or measured (`SpeculationConfig.costs`). Empty where nobody asks for it."""
        return self._costs.listed

    def fix_costs(self, costs: Costs) -> None:
        """From now on steps cost this, whatever they take: see `SpeculationConfig.costs`."""
        if self._config is not None:
            self._config = replace(self._config, costs=costs)
            self._costs = PassCosts(costs)
            self.start_over()

    def start_over(self) -> None:
        """Forget whether guessing has won: what is guessed for the requests to come is a function of them alone, where
        costs are given."""
        self._loads.clear()
        self._worths.clear()

    def propose(self, sequences: list[Sequence]) -> None:
        """Give each sequence whose next pass draws one token the tree to be verified in it, if that is worth it."""
        self.guesses = self._load = self._worth = None
        if self._config is None:
            return
        for seq in sequences:
            seq.num_draft_tokens = 0
        if self._config.max_sequences is not None and len(sequences) > self._config.max_sequences:
            return
        # A grammar allows after each node what only it knows: such sequences go on token by token.
        able = [s for s in sequences if s.grammar is None and s.speculates]
        eligible = [s for s in able if len(s.token_ids) - s.num_computed_tokens == 1]
        if not self._config.adaptive:
            self._guess(eligible, self._config)
            return
        load = self._loads.setdefault(len(sequences).bit_length(), KnownRate() if self._config.costs else GuessRate())
        num_tokens = sum(len(seq.token_ids) - seq.num_computed_tokens for seq in sequences)
        self._load = load if len(sequences) == num_tokens else None  # rates are those of passes that only decode
        self._started, self._drafting = time.perf_counter(), 0.0
        self._shape = len(sequences), num_tokens
        if load.drafts:
            resting = rests(self._records, np.array([seq.slot for seq in eligible], np.int64))
            eligible = [seq for seq, rest in zip(eligible, resting.tolist(), strict=True) if not rest]
            self._guess(eligible, self._config, (len(sequences), num_tokens))
            if self.guesses is not None:
                self._shape = len(sequences), num_tokens + len(self.guesses.tokens)
        else:
            for seq in eligible:
                if seq.slot >= 0:
                    self._records[seq.slot] *= FORGETTING  # that guessing is tried again some time

    def kept(self, batch: list[Scheduled]) -> Guesses | None:
        """The guesses that a scheduled pass has room for; None: nobody was guessed for."""
        if self.guesses is not None:
            self.guesses.keep(batch)
        return self.guesses

    def disturbed(self) -> None:
        """The pass to come is another than was proposed: what it takes says nothing."""
        self._load = self._worth = None

    def observe(self, num_tokens: int) -> None:
        """The pass that was proposed is over, and gave so many tokens."""
        took = time.perf_counter() - self._started
        if isinstance(self._load, KnownRate):
            plain = self._costs.plain(self._shape[0])
            if plain:
                seconds = plain if self.guesses is None else self._costs.guessed(*self._shape)
                self._load.observe(num_tokens, seconds, self._shape[0] / plain)
        elif self._load is not None:
            seconds, expected = took, self._costs.guessed(*self._shape)
            if self._drafter is not None and self._worth is not None and self._worth.drafted:
                # What is read once of a prompt serves all guesses of its answer: this one pays a share of it.
                seconds -= self._drafter.catch_up_seconds * (1 - 1 / _GUESSES)
                expected += self._drafter.seconds(self._shape[0])
            seconds = min(seconds, _HELD_UP * expected)
            if self._worth is None or not self._worth.trying:  # a try says nothing of what is usual
                self._load.observe(num_tokens, seconds)
            self._costs.observe(*self._shape, took - self._drafting)
            if self._worth is not None:
                self._worth.observe(num_tokens, seconds)
        self._load = self._worth = None

    def _guess(self, sequences: list[Sequence], config: SpeculationConfig, load: tuple[int, int] | None = None) -> None:
        """Make the `guesses` of the coming pass. `load`: how many sequences and tokens it has anyway: of all nodes the
        best are chosen then, as many as give the most tokens a second."""
        able = [seq for seq in sequences if seq.speculates and self._left(seq) > 1]
        if not able:
            return
        retrieved, drafts = self._retrieve(able, config), None
        slots = np.array([self._slot(seq) for seq in able])
        guesses = self._fused(able, slots, retrieved, None, config)
        if self._drafter is not None:
            promise = promise_of(guesses.chances, guesses.stops, self._records, slots) / len(able)
            if self._drafts(len(able), promise, config):
                drafts = self._draft(able, self._least_promise(len(able), config))
                guesses = self._fused(able, slots, retrieved, drafts, config)
        if not all(seq.speculates for seq in able):  # whom a source has failed goes on alone
            self._guess(able, config, load)
            return
        if load is not None:
            costs = self._costs.of(load[0]), self._costs.sizes
            guesses.take(*choose(*guesses.trees, self._records, slots, *load, *costs))
        guesses.propose()
        self.guesses = guesses

    def _slot(self, seq: Sequence) -> int:
        """The row of what is remembered of a sequence."""
        if seq.slot < 0:
            if not self._free:
                size = len(self._records)
                self._records = np.concatenate([self._records, np.zeros((max(8, size), self._records.shape[1]))])
                self._free = list(range(size, len(self._records)))
            seq.slot = self._free.pop()
            self._records[seq.slot] = 0
        return seq.slot

    def forget(self, seq: Sequence) -> None:
        """A sequence has ended."""
        if seq.slot >= 0:
            self._free.append(seq.slot)
            seq.slot = -1

    def _drafts(self, num_sequences: int, promise: float, config: SpeculationConfig) -> bool:
        """Whether to ask the draft head, where retrieval promises so many accepted tokens a sequence."""
        if not config.adaptive or not isinstance(self._load, GuessRate):
            return True
        assert self._drafter is not None
        plain = self._costs.plain(num_sequences)
        if plain and _MOST_GAIN * plain < self._drafter.seconds(num_sequences):
            return False  # not worth a try
        key = (num_sequences.bit_length(), int(np.searchsorted(_PROMISES, promise)))
        self._worth = self._worths.setdefault(key, DraftWorth())
        return self._worth.choose(self._load.rate)

    def _least_promise(self, num_sequences: int, config: SpeculationConfig) -> float:
        """The accepted tokens in all that must be in sight for a draft to look a level deeper."""
        assert self._drafter is not None
        if not config.adaptive:
            return 0.0
        if not isinstance(self._load, GuessRate):
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
        """End the guessing for a request, and nothing else; it is counted once, whatever else fails it."""
        if not seq.speculates:
            return
        seq.speculates = False
        self.num_failures += 1
        _log.warning("Request %s goes on without speculation: %s", seq.request.request_id, error)

    def _left(self, seq: Sequence) -> int:
        """How many tokens may still be drawn."""
        return min(seq.request.sampling.max_tokens - seq.num_output_tokens, self._max_model_len - len(seq.token_ids))

    def _fused(
        self,
        sequences: list[Sequence],
        slots: np.ndarray,
        retrieved: list[TokenForest],
        drafts: list[Drafted | None] | None,
        config: SpeculationConfig,
    ) -> Guesses:
        """What all sources say of each sequence, as one tree."""
        draft, scores, factors = _side_by_side(drafts) if drafts else self._without_draft(len(sequences))
        forests = (draft, *retrieved)
        columns, ends, matches = join(*zip(*((f.columns, f.stops, f.match_lengths) for f in forests), strict=True))
        known = matches, self._records, slots, scores, factors
        depths = np.array([self._left(seq) - 1 for seq in sequences])
        if self._verifies_trees:
            trees = fuse_all(columns, ends, *known, config.num_nodes, depths)
        else:
            depths = np.minimum(depths, config.num_nodes)
            trees = chains(*fuse_all(columns, ends, *known, self._retrieved_nodes(config), depths))
        return Guesses(sequences, slots, columns, ends, *trees)

    def _retrieved_nodes(self, config: SpeculationConfig) -> int:
        return config.num_nodes if self._verifies_trees else min(_WIDTH * config.num_nodes, 63)

    def _retrieve(self, sequences: list[Sequence], config: SpeculationConfig) -> list[TokenForest]:
        """What each retriever says of all sequences. One that fails a sequence ends its guessing."""
        contexts = [seq.context()[-config.max_lookback :] for seq in sequences]
        tokens, stops = np.concatenate(contexts), np.array([len(context) for context in contexts]).cumsum()
        forests, num_nodes = [], self._retrieved_nodes(config)
        for retriever in self._retrievers:
            all_at_once = getattr(retriever, "retrieve_all", None)  # of a `BatchRetriever`
            if all_at_once is not None:
                try:
                    forests.append(_checked(all_at_once(tokens, stops, num_nodes), self._vocab_size))
                    continue
                except Exception:
                    _log.debug("A retriever fails; whom it fails is seen one by one.", exc_info=True)
            trees = []
            for seq, context in zip(sequences, contexts, strict=True):
                try:
                    trees.append(_valid(retriever.retrieve(context, num_nodes), self._vocab_size))
                except Exception as error:
                    self._give_up(seq, error)
                    trees.append(TokenTree.empty())
            forests.append(TokenForest.of(trees))
        return forests

    def _without_draft(self, num_sequences: int) -> tuple[TokenForest, np.ndarray, np.ndarray]:
        if num_sequences not in self._nothing:
            self._nothing[num_sequences] = _side_by_side([None] * num_sequences)
        return self._nothing[num_sequences]

    def settle(self, drawn: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nodes of the guesses that the model agrees with, of each sequence from the root down, int64, and the
        stops `[S]` of the sequences' paths. What the model drew after a sequence's last token is at `rows` `[S]` of
        `drawn`; what it drew after its tree's nodes follows."""
        of = self.guesses
        assert of is not None
        paths, ends = verify_all(of.tokens, of.parents, of.stops, drawn, rows)
        known = of.columns, of.ends, self._records, of.slots, of.chances, of.stops
        learn_all(*known, drawn, rows, paths, ends, self._per_position)
        self.num_drafts += int(np.count_nonzero(sizes_of(of.stops)))
        self.num_draft_tokens += len(of.tokens)
        self.num_accepted_tokens += len(paths)
        return paths, ends


class _Nonsense:
    """A retriever that is always there, and nearly always wrong."""

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        chain = np.arange(num_nodes, dtype=np.int32)
        return TokenTree(0 * chain, chain - 1, np.ones(num_nodes, np.float32))


_NO_TREE = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
_NO_DRAFT = Drafted(_NO_TREE, np.empty(0, np.float32), 0.0, 0.0, 0.0)


def _side_by_side(drafts: list[Drafted | None]) -> tuple[TokenForest, np.ndarray, np.ndarray]:
    """A draft's trees, and what it holds of any next token, as `fuse_all` takes them."""
    found = [_NO_DRAFT if draft is None else draft for draft in drafts]
    width = max(len(draft.scores) for draft in found)
    scores = np.zeros((len(found), width), np.float32)
    for row, draft in zip(scores, found, strict=True):
        row[: len(draft.scores)] = draft.scores
    factors = np.array([(draft.scale, draft.norm, draft.least) for draft in found])
    return TokenForest.of([TokenTree(*draft.tree) for draft in found]), scores, factors


def _valid(tree: TokenTree, vocab_size: int) -> TokenTree:
    """Raise `ValueError` for a tree that no model can verify."""
    if not len(tree.tokens) == len(tree.parents) == len(tree.weights):
        raise ValueError("a retriever's tree has columns of different lengths.")
    _checked(TokenForest.of([tree]), vocab_size)
    return tree


def _checked(forest: TokenForest, vocab_size: int) -> TokenForest:
    """Raise `ValueError` for trees that no model can verify."""
    if not are_trees(forest.columns, forest.stops, vocab_size):
        raise ValueError(
            "a retriever proposes nodes that stand before their parents, or tokens that a vocabulary of "
            f"{vocab_size} does not have."
        )
    return forest
