"""Which sequences run in the next forward pass, and with how many tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from thornback.engine.block_manager import BlockManager
from thornback.engine.sequence import Sequence


@dataclass(slots=True)
class Scheduled:
    """`num_tokens` of `seq`, from its first token without keys and values on, run in this pass; and under the last of
    them a tree of `num_draft_tokens`."""

    seq: Sequence
    num_tokens: int
    num_draft_tokens: int = 0

    @property
    def draws(self) -> bool:
        """Whether this pass reaches the sequence's last token, so that a new one is drawn."""
        return self.seq.num_computed_tokens + self.num_tokens == len(self.seq.token_ids)


class Scheduler:
    """First come, first served; running sequences before waiting ones, prompts in chunks of the token budget.

    When blocks run out the youngest running sequence gives its blocks back and waits again at the head of the
    queue; its tokens are computed anew, and positional randomness makes it go on as if nothing had happened.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0

    def schedule(self) -> list[Scheduled]:
        budget = self.max_num_batched_tokens
        batch: list[Scheduled] = []
        position = 0
        preempted = False
        while position < len(self.running) and budget > 0:
            seq = self.running[position]
            num_tokens = min(len(seq.token_ids) - seq.num_computed_tokens, budget)
            while not self.blocks.grow(seq, seq.num_computed_tokens + num_tokens):
                if self._take_back(None):
                    continue
                preempted = True
                if self.preempt(self.running[-1]) is seq:
                    break
            else:
                item = self.scheduled(seq, num_tokens)
                budget -= num_tokens
                if seq.num_draft_tokens and self._has_room(item, seq.num_draft_tokens, budget):
                    item.num_draft_tokens = seq.num_draft_tokens
                    budget -= seq.num_draft_tokens
                batch.append(item)
                position += 1
        while self.waiting and budget > 0 and not preempted and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if seq.kv is not None:
                seq.num_computed_tokens = seq.num_cached_tokens = seq.kv.num_tokens
            else:
                self.blocks.reuse_prefix(seq)
            num_tokens = min(len(seq.token_ids) - seq.num_computed_tokens, budget)
            if not self.blocks.grow(seq, seq.num_computed_tokens + num_tokens):
                if seq.kv is None:
                    self.drop_blocks(seq)
                if not self.running and self._take_back(seq):  # else who runs will make room
                    continue
                break
            self.running.append(self.waiting.popleft())
            batch.append(self.scheduled(seq, num_tokens))
            budget -= num_tokens
        return batch

    def _take_back(self, spared: Sequence | None) -> bool:
        """Take the blocks of the youngest waiting sequence whose keys and values have arrived, and but for `spared`:
        they are computed again when it runs."""
        for seq in reversed(self.waiting):
            if seq.block_table and seq is not spared:
                self.drop_blocks(seq)
                seq.kv = None
                return True
        return False

    def _has_room(self, item: Scheduled, num_draft_tokens: int, budget: int) -> bool:
        """Whether a draft may be verified in this pass: it takes what is free, and nothing from anybody."""
        num_tokens = item.seq.num_computed_tokens + item.num_tokens + num_draft_tokens
        return item.draws and num_draft_tokens <= budget and self.blocks.grow(item.seq, num_tokens)

    def scheduled(self, seq: Sequence, num_tokens: int) -> Scheduled:
        self.blocks.remember(seq, seq.num_computed_tokens + num_tokens)
        return Scheduled(seq, num_tokens)

    def preempt(self, seq: Sequence) -> Sequence:
        """Take a running sequence's blocks away and let it wait at the head of the queue."""
        self.running.remove(seq)
        self.drop_blocks(seq)
        self.waiting.appendleft(seq)
        self.num_preempted += 1
        return seq

    def drop_blocks(self, seq: Sequence) -> None:
        """Give back everything that the sequence holds; it starts over from its first token."""
        self.blocks.release(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = seq.num_cached_tokens = seq.num_hashed_blocks = seq.num_drafted_tokens = 0
        seq.hidden.clear()

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence, wherever it is, and free its blocks."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self.drop_blocks(seq)
