"""thornback's own engine: continuous batching over any decoder-only transformers model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from thornback.algorithms import runs_of
from thornback.contracts import (
    MIXED_VERSIONS,
    BlockRun,
    ConfigError,
    EngineConfig,
    EngineLoad,
    FinishReason,
    InFlight,
    InvalidRequest,
    KVExport,
    KVImport,
    Lease,
    ModelError,
    Output,
    Request,
    Reservation,
    Retriever,
    WeightView,
)
from thornback.engine.block_manager import BlockManager
from thornback.engine.draft_head import DraftHead
from thornback.engine.draft_model import block_shapes, load_draft
from thornback.engine.drafter import Drafter
from thornback.engine.kv_pool import KVPool
from thornback.engine.layout import NO_PARENTS, draws
from thornback.engine.leases import Leases
from thornback.engine.lora import AdapterSet
from thornback.engine.model import ModelShape, load_model
from thornback.engine.model_runner import ModelRunner, fresh_seeds
from thornback.engine.pass_costs import Costs
from thornback.engine.requests import check_request
from thornback.engine.sampler import Sampled
from thornback.engine.scheduler import Scheduled, Scheduler
from thornback.engine.sequence import Sequence
from thornback.engine.speculation import Guesses, Speculation
from thornback.engine.step_trials import time_steps
from thornback.engine.structured import GrammarCompiler
from thornback.engine.weights import bind_weights

if TYPE_CHECKING:
    from xgrammar import GrammarMatcher


@dataclass(slots=True)
class _Turn:
    """A sequence that draws from `row` of the logits, and from the rows after it for the nodes of its draft."""

    seq: Sequence
    row: int
    num_draft_tokens: int = 0
    first_node: int = 0  # of its draft, among the tokens of the pass
    at: int = 0  # its first draw
    path: list[int] = field(default_factory=list)  # the draft's nodes that the model agrees with


def _draws_of(turns: list[_Turn], parents: np.ndarray) -> np.ndarray:
    """`draws` of all turns, each of which is told where its own begin. `parents`: of all their drafts' nodes."""
    at = 0
    for turn in turns:
        turn.at = at
        at += 1 + turn.num_draft_tokens
    counts = np.array([turn.num_draft_tokens for turn in turns])
    return draws(np.array([turn.row for turn in turns]), parents, counts)


class TorchEngine:
    """The `Engine` contract over a model directory (or hub name) in this process. Not thread-safe."""

    def __init__(
        self, model: str | Path, config: EngineConfig | None = None, retrievers: tuple[Retriever, ...] = ()
    ) -> None:
        config = config or EngineConfig()
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.model_name = str(model)
        self.model = load_model(model, config.device, config.dtype)
        self.shape = ModelShape.of(self.model)
        self.vocab_size = self.shape.vocab_size
        weight = next(self.model.parameters())
        self.max_model_len = min(config.max_model_len or self.shape.max_positions, self.shape.max_positions)
        draft = load_draft(config.speculation, self.model)
        block_shape, *others = block_shapes(self.shape, draft, config.block_size)
        num_blocks = self._num_blocks(weight.element_size() * sum(map(prod, (block_shape, *others))))
        self.max_model_len = min(self.max_model_len, num_blocks * config.block_size)
        self.pool = KVPool(num_blocks, block_shape, weight.dtype, weight.device, config.kv_location)
        self.blocks = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, config.max_num_batched_tokens)
        adapters = AdapterSet(self.model, config.adapters)
        keep_hidden = isinstance(draft, DraftHead)
        self.runner = ModelRunner(self.model, self.pool, adapters, self.max_model_len, keep_hidden)
        if config.speculation and (self.shape.sliding_window or self.max_model_len) < self.max_model_len:
            raise ConfigError(
                f"{model} attends to the last {self.shape.sliding_window} tokens only, which speculation does not see: "
                "leave it out, or make max_model_len no longer than that."
            )
        self.drafter: Drafter | None = None
        if config.speculation and draft is not None:
            self.drafter = Drafter(config.speculation, draft, self.pool.tensor, self.blocks, self.max_model_len)
        self.speculation = Speculation(
            config.speculation, retrievers, self.drafter, self.max_model_len, self.shape.vocab_size
        )
        self._sequences: dict[str, list[Sequence]] = {}
        self.weight_version = 0
        self._leases = Leases(self.blocks, config.lease_seconds)
        self._seeds = fresh_seeds()
        self._grammars: GrammarCompiler | None = None
        self._paused = False
        self.measure_costs()

    def _num_blocks(self, block_bytes: int) -> int:
        if self.config.num_blocks:
            return self.config.num_blocks
        wanted = -(-self.max_model_len // self.config.block_size) * self.config.max_num_seqs
        return max(1, min(wanted, self.config.kv_cache_memory_bytes // block_bytes))

    def measure_costs(self) -> Costs:
        """What steps cost (`SpeculationConfig.costs`), measured now unless they are given; empty without speculation.

        It needs an idle engine, and, to be right, an idle machine."""
        if self._sequences:
            raise RuntimeError("Passes are being timed on a busy engine; run its requests to their end first.")
        self.speculation.measure(self.runner.try_pass, self.config.max_num_batched_tokens)
        trials = self.speculation.trials()
        if trials is not None:
            self.speculation.add_overhead(*time_steps(self, trials))
            if self.drafter is not None:
                self.drafter.forget_times()
        self.flush_prefix_cache()  # a pass that is only tried spoils a block
        return self.speculation.costs

    def fix_costs(self, costs: Costs) -> None:
        """See `SpeculatingEngine`."""
        self.speculation.fix_costs(costs)

    def start_over(self) -> None:
        """See `SpeculatingEngine`."""
        self.speculation.start_over()

    # Requests

    def add_request(self, request: Request, kv: KVImport | None = None) -> None:
        if request.request_id in self._sequences:
            raise InvalidRequest(f"Request id {request.request_id} is in use; ids must be unique while they run.")
        check_request(request, self.shape.vocab_size, self.max_model_len, self.runner.adapters.names)
        sampling = request.sampling
        arrived: list[int] | None = []
        if kv is not None and isinstance(kv.blocks, Reservation):
            arrived = self._leases.take(kv.blocks)
        if kv is not None and (kv.weight_version != self.weight_version or arrived is None):
            self.blocks.release(arrived or [])
            arrived, kv = [], None  # of other weights, or given up meanwhile: they are computed here
        seed = next(self._seeds) if sampling.seed is None else sampling.seed
        eos = frozenset() if sampling.ignore_eos else self.shape.eos_token_ids
        sequences = [
            Sequence(
                request=request,
                index=index,
                seed=(seed + index) % (1 << 64),
                token_ids=[*request.prompt_token_ids, *request.output_token_ids],
                stop_ids=eos.union(sampling.stop_token_ids),
                num_prompt_tokens=len(request.prompt_token_ids),
                # A cached prefix would leave prompt positions without logits.
                cacheable=sampling.prompt_logprobs is None,
                prompt_logprobs=None if sampling.prompt_logprobs is None else [None],
                grammar=self._grammar(request),
                kv=kv,
            )
            for index in range(sampling.n)
        ]
        sequences[0].siblings = sequences[1:]
        sequences[0].block_table = arrived or []
        self._sequences[request.request_id] = list(sequences)
        self.scheduler.waiting.append(sequences[0])

    def _grammar(self, request: Request) -> GrammarMatcher | None:
        if request.sampling.json_schema is None:
            return None
        if self._grammars is None:
            stops = sorted(self.shape.eos_token_ids)
            self._grammars = GrammarCompiler(self.model_name, self.shape.vocab_size, stops)
        matcher = self._grammars.matcher(request.sampling.json_schema)
        for token in request.output_token_ids:
            matcher.accept_token(token)
        return matcher

    def abort_request(self, request_id: str) -> None:
        for seq in self._sequences.pop(request_id, ()):
            self._remove(seq)

    def _remove(self, seq: Sequence) -> None:
        """Free a sequence wherever it stands: running, waiting, or behind its first sibling."""
        if seq in self.scheduler.running or seq in self.scheduler.waiting:
            self.scheduler.finish(seq)
            self.speculation.forget(seq)
        seq.siblings = []

    def has_unfinished_requests(self) -> bool:
        return bool(self._sequences)

    # The step

    @torch.inference_mode()
    def step(self) -> list[Output]:
        self._leases.expire()
        if self._paused:
            return []
        self.speculation.propose(self.scheduler.running)
        batch = self.scheduler.schedule()
        if not batch:
            return []
        for item in batch:
            self._take_import(item.seq)
        guesses = self.speculation.kept(batch)
        parents = NO_PARENTS if guesses is None else guesses.parents
        logits, first_row = self.runner.forward(batch, None if guesses is None else guesses.tokens, parents)
        turns: list[_Turn] = []
        first_token, forked = 0, False  # `first_token`: of an item among the pass's
        for item, row in zip(batch, first_row, strict=True):
            seq, draws, last_row = item.seq, item.draws, row
            if seq.prompt_logprobs is not None:
                self._keep_prompt_scores(item, logits, row)
                if seq.num_computed_tokens < seq.num_prompt_tokens:
                    last_row += item.num_tokens - 1  # it has a row for each of its tokens
            if self.drafter is not None and self.drafter.reads_hidden:
                seq.hidden.append((seq.num_computed_tokens, self.runner.hidden, first_token, item.num_tokens))
            first_token += item.num_tokens + item.num_draft_tokens
            seq.num_computed_tokens += item.num_tokens
            if draws:
                turns.append(_Turn(seq, last_row, item.num_draft_tokens, first_token - item.num_draft_tokens))
                if seq.siblings:
                    forked = True
                    turns += [_Turn(sibling, last_row) for sibling in self._fork(seq)]
        if not turns:
            return []
        rows, owners, ahead = _draws_of(turns, parents)
        if len(rows) != len(logits) or forked:  # else they are all rows, in order
            logits = logits[torch.from_numpy(rows).to(logits.device)]
        sampled = self.runner.draw(logits, [turn.seq for turn in turns], owners, ahead, self._grammars)
        if guesses is not None:
            self._settle(guesses, turns, sampled.tokens)
        outputs = [self._advance(turn.seq, [turn.at, *(turn.at + 1 + n for n in turn.path)], sampled) for turn in turns]
        self.speculation.observe(sum(len(output.token_ids) for output in outputs))
        return outputs

    def _settle(self, guesses: Guesses, turns: list[_Turn], drawn: list[int]) -> None:
        """Find the nodes of each draft that the model agrees with; their keys and values move to where they belong."""
        turn_of = {id(turn.seq): turn for turn in turns if turn.num_draft_tokens}
        ours = [turn_of.get(id(seq)) for seq in guesses.sequences]
        rows = np.array([0 if turn is None else turn.at for turn in ours])
        paths, ends = self.speculation.settle(np.array(drawn), rows)
        reads_hidden = self.drafter is not None and self.drafter.reads_hidden
        size, sources, targets, nodes, begin = self.config.block_size, [], [], paths.tolist(), 0
        for turn, end in zip(ours, ends.tolist(), strict=True):
            if end == begin or turn is None:
                continue
            seq = turn.seq
            turn.path, begin = nodes[begin:end], end
            start, table = seq.num_computed_tokens, seq.block_table
            in_place = turn.path[-1] == len(turn.path) - 1
            for i, node in enumerate(() if in_place and not reads_hidden else turn.path):
                if node != i:
                    sources.append(table[(start + node) // size] * size + (start + node) % size)
                    targets.append(table[(start + i) // size] * size + (start + i) % size)
                if reads_hidden:
                    seq.hidden.append((start + i, self.runner.hidden, turn.first_node + node, 1))
            seq.num_computed_tokens += len(turn.path)
        if sources:
            self.pool.move_tokens(np.array(sources), np.array(targets))

    def _fork(self, seq: Sequence) -> Iterable[Sequence]:
        """The prompt is computed: the other samples share its full blocks and get a copy of the last, part-filled
        one. Those that find no room wait like any request."""
        siblings, seq.siblings = seq.siblings, []
        if self.drafter is not None:
            self.speculation.guard(seq, self.drafter.catch_up, None)  # once for all of them
        for sibling in siblings:
            tail = seq.num_computed_tokens % self.config.block_size
            if len(self.scheduler.running) >= self.config.max_num_seqs or self.blocks.num_free < bool(tail):
                self.scheduler.waiting.append(sibling)
                continue
            shared = seq.block_table[:-1] if tail else list(seq.block_table)
            self.blocks.share(shared)
            sibling.block_table = shared
            if tail:
                sibling.block_table = shared + self.blocks.allocate(1, after=shared[-1] if shared else None)
                self.pool.copy_block(seq.block_table[-1], sibling.block_table[-1])
                if self.drafter is not None:
                    self.drafter.model.copy_block(seq.block_table[-1], sibling.block_table[-1])
            copied = "num_computed_tokens num_hashed_blocks prefix_node prompt_logprobs num_drafted_tokens"
            for name in copied.split():
                setattr(sibling, name, getattr(seq, name))
            sibling.hidden.extend(seq.hidden)
            sibling.num_cached_tokens = seq.num_computed_tokens
            self.scheduler.running.append(sibling)
            yield sibling

    def _advance(self, seq: Sequence, rows: list[int], sampled: Sampled) -> Output:
        """Append the drawn tokens up to the one that ends the sequence, and say so. Tokens behind it are dropped."""
        request, sampling = seq.request, seq.request.sampling
        num_before = len(seq.token_ids) - seq.num_prompt_tokens
        first = num_before == len(request.output_token_ids)
        reason: FinishReason | None = None
        for done, row in enumerate(rows, 1):
            token = sampled.tokens[row]
            seq.token_ids.append(token)
            if seq.grammar is not None:
                seq.grammar.accept_token(token)
            if token in seq.stop_ids:
                reason = "stop"
            elif num_before + done >= sampling.max_tokens or len(seq.token_ids) >= self.max_model_len:
                reason = "length"
            if reason:
                rows = rows[:done]
                break
        export = self._export(seq) if request.export_kv and reason is None else None
        if reason or export:
            self._finish(seq)
        return Output(
            request.request_id,
            [sampled.tokens[row] for row in rows],
            [sampled.logprobs[row] for row in rows],
            seq.index,
            reason,
            self.weight_version,
            seq.num_cached_tokens if first else 0,
            [sampled.top(row, sampling.logprobs) for row in rows] if sampling.logprobs is not None else None,
            seq.prompt_logprobs if first else None,
            export,
        )

    def _finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.speculation.forget(seq)
        rest = self._sequences[seq.request.request_id]
        rest.remove(seq)
        if not rest:
            del self._sequences[seq.request.request_id]

    def _keep_prompt_scores(self, item: Scheduled, logits: torch.Tensor, row: int) -> None:
        seq, wanted = item.seq, item.seq.request.sampling.prompt_logprobs
        if wanted is not None and seq.num_computed_tokens < seq.num_prompt_tokens:
            assert seq.prompt_logprobs is not None
            if seq.num_computed_tokens == 0:
                del seq.prompt_logprobs[1:]  # a preempted prompt is scored again
            scores = logits[row : row + item.num_tokens]
            seq.prompt_logprobs += self.runner.prompt_scores(scores, seq, seq.num_computed_tokens, wanted)

    # Keys and values on the move

    def _take_import(self, seq: Sequence) -> None:
        if seq.kv is not None:
            if not isinstance(seq.kv.blocks, Reservation):
                self.pool.write(seq.block_table[: self.blocks.blocks_for(seq.kv.num_tokens)], seq.kv.blocks)
            if self.drafter is not None:
                self.drafter.take_import(seq, seq.kv)
            seq.kv = None

    def _export(self, seq: Sequence) -> KVExport:
        """Offer a sequence's blocks under a lease; the drawn token has no keys and values yet."""
        read: tuple[int, np.ndarray | None] = 0, None
        if self.drafter is not None:
            read = self.speculation.guard(seq, self.drafter.prepare_export, read)
        used = seq.block_table[: self.blocks.blocks_for(seq.num_computed_tokens)]
        lease = self._leases.offer(used)
        return KVExport(
            request_id=seq.request.request_id,
            token_ids=tuple(seq.token_ids),
            num_tokens=seq.num_computed_tokens,
            runs=tuple(BlockRun(*run) for run in runs_of(used)),
            location=self.pool.location,
            lease=lease,
            dtype=self.pool.dtype,
            block_shape=self.pool.block_shape,
            weight_version=MIXED_VERSIONS if seq.mixes_weights else self.weight_version,
            num_drafted_tokens=read[0],
            hidden=read[1],
        )

    def reserve(self, num_tokens: int) -> Reservation | None:
        self._leases.expire()
        return self._leases.reserve(self.blocks.blocks_for(num_tokens))

    def release(self, lease: Lease) -> None:
        self._leases.release(lease)

    # Control

    def load_weights(self, weights: WeightView, version: int, in_flight: InFlight = "finish") -> None:
        if in_flight == "finish" and self._sequences:
            raise RuntimeError(
                f"{len(self._sequences)} requests are unfinished: run them to their end before weights are swapped, "
                "or say what becomes of them (in_flight='recompute' or 'keep')."
            )
        bind_weights(self.model, weights)
        self.runner.refresh()
        if self.drafter is not None:
            self.drafter.refresh()
        self.weight_version = version
        self.flush_prefix_cache()
        for seqs in list(self._sequences.values()):
            for seq in seqs:
                if seq.kv is not None:
                    self.scheduler.drop_blocks(seq)
                    seq.kv = None
                if in_flight == "recompute" and seq in self.scheduler.running:
                    self.scheduler.preempt(seq)
                elif seq.block_table:
                    seq.cacheable, seq.mixes_weights = False, True

    def load_draft(self, weights: WeightView) -> None:
        """Give the draft head these parameters, which were learned for the model's present ones. Raises `RuntimeError`
        while requests run, and `ModelError` if there is no head or they do not fit it."""
        if self.drafter is None or self.drafter.head is None:
            raise ModelError(f"An engine of {self.model_name} has no draft head to load; name one in its speculation.")
        if self._sequences:
            raise RuntimeError(f"{len(self._sequences)} requests are unfinished: run them to their end first.")
        self.drafter.load(weights)
        self.flush_prefix_cache()  # cached blocks hold what the head has read with its parameters of before

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def flush_prefix_cache(self) -> None:
        self.blocks.flush()

    def load(self) -> EngineLoad:
        self._leases.expire()
        waiting = self.scheduler.waiting
        behind = sum(len(seq.siblings) for seqs in self._sequences.values() for seq in seqs)
        return EngineLoad(
            num_running=len(self.scheduler.running),
            num_waiting=len(waiting) + behind,
            num_preempted=self.scheduler.num_preempted,
            num_waiting_tokens=sum(len(seq.token_ids) - seq.num_computed_tokens for seq in waiting),
            num_free_blocks=self.blocks.num_free,
            num_blocks=self.blocks.num_blocks,
            weight_version=self.weight_version,
            speculation=self.speculation.stats,
        )
