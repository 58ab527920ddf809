"""Which prompts a step sees, and from which seeds they are answered: functions of the step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thornback.actors import PromptShard
from thornback.contracts import Anchor, Prompt, Trajectory

SEED_BITS = 62  # sample i adds i, and seeds are signed 64-bit numbers in some engines


def seed_of(*parts: object) -> int:
    """A number in [0, 2^62) from a run's seed and whatever else tells a rollout apart; the same on any machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt and its token ids, as every engine gets them."""

    prompt: Prompt
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """The prompts of one step (or of one evaluation) in order, and the seed of each."""

    prompts: tuple[Prompt, ...]
    shard: PromptShard

    def split(self, count: int) -> list[PromptBatch]:
        """At most `count` contiguous pieces, as equal as can be: always the same for the same batch."""
        pieces = [p for p in np.array_split(np.arange(len(self.prompts)), count) if len(p)]
        return [self._piece(int(p[0]), int(p[-1]) + 1) for p in pieces]

    def _piece(self, start: int, end: int) -> PromptBatch:
        return PromptBatch(self.prompts[start:end], self.shard.piece(start, end))

    @classmethod
    def concat(cls, batches: Sequence[PromptBatch]) -> PromptBatch:
        """Batches end to end."""
        shards = [batch.shard for batch in batches]
        whole = PromptShard(
            *(
                tuple(value for shard in shards for value in getattr(shard, name))
                for name in ("keys", "token_ids", "seeds", "trajectories")
            )
        )
        return cls(tuple(prompt for batch in batches for prompt in batch.prompts), whole)


def make_prompt_batch(
    prompts: Sequence[TokenizedPrompt], seeds: Sequence[int], anchors: Mapping[str, Anchor] | None = None
) -> PromptBatch:
    """Prompts with their seeds, and with the cached trajectories of those that have one."""

    def trajectory(key: str) -> Trajectory | None:
        anchor = anchors.get(key) if anchors else None
        return None if anchor is None else anchor.trajectory

    keys = tuple(p.prompt.key for p in prompts)
    shard = PromptShard(keys, tuple(p.token_ids for p in prompts), tuple(seeds), tuple(map(trajectory, keys)))
    return PromptBatch(tuple(p.prompt for p in prompts), shard)


class PromptSource:
    """A stream of prompts: epoch after epoch, each in an order of its own. Its position is the step's number."""

    def __init__(self, prompts: Sequence[TokenizedPrompt], seed: int, per_step: int, shuffle: bool = True) -> None:
        self.prompts = list(prompts)
        self._seed = seed
        self.per_step = per_step
        self._shuffle = shuffle
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, step: int, anchors: Mapping[str, Anchor] | None = None) -> PromptBatch:
        """The prompts of step `step`, counted from 0. A prompt's seed depends on the run's seed, its key and the
        epoch, so that it is answered anew each time that it comes."""
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        return self.at(positions, anchors)

    def at(self, positions: Sequence[int], anchors: Mapping[str, Anchor] | None = None) -> PromptBatch:
        """The prompts at these positions of the stream."""
        chosen, seeds = [], []
        for position in positions:
            epoch, place = divmod(position, len(self.prompts))
            prompt = self.prompts[self._order_of(epoch)[place]]
            chosen.append(prompt)
            seeds.append(seed_of(self._seed, "train", prompt.prompt.key, epoch))
        return make_prompt_batch(chosen, seeds, anchors)

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self.prompts))
            if self._shuffle:
                order = np.random.default_rng([self._seed, epoch]).permutation(order)
            self._order = (epoch, order)
        return self._order[1]
