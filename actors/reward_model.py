"""The reward model: turns rollouts into text and judges them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import ray

from thornback.actors.locations import local_model
from thornback.actors.supervision import Home
from thornback.contracts import FINISH_REASONS, Completion, Prompt, RewardScorer, RolloutBatch, Turn, offsets_of
from thornback.data import load_tokenizer


@dataclass(frozen=True, slots=True)
class RewardTable:
    """The small part of scored rollouts, which the driver holds: one row a rollout, in the batch's order.

    `rewards[name]` float32 (NaN: does not apply), `correct` float32 in {0, 1} (NaN: its environment failed), `lengths`
    int32 (the model's own tokens), `truncated` bool (out of tokens or turns before the end), `num_calls` int32 (tool
    calls). `failures`: rewards that failed, by cause: how often, and the first one's prompt. `texts` only where they
    were asked for.
    """

    rewards: dict[str, np.ndarray]
    correct: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    num_calls: np.ndarray
    seconds: float
    failures: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    texts: tuple[str, ...] = ()

    @classmethod
    def concat(cls, tables: list[RewardTable]) -> RewardTable:
        """Tables end to end; the seconds are those of the slowest."""
        return cls(
            rewards={name: np.concatenate([t.rewards[name] for t in tables]) for name in tables[0].rewards},
            correct=np.concatenate([t.correct for t in tables]),
            lengths=np.concatenate([t.lengths for t in tables]),
            truncated=np.concatenate([t.truncated for t in tables]),
            num_calls=np.concatenate([t.num_calls for t in tables]),
            seconds=max(t.seconds for t in tables),
            failures=_added(t.failures for t in tables),
            texts=tuple(text for t in tables for text in t.texts),
        )

    def split(self, counts: Sequence[int]) -> list[RewardTable]:
        """The inverse of `concat`, for so many rows each. What failed, and how long it took, stays with the first."""
        ends = np.cumsum(counts)
        return [
            replace(
                self,
                rewards={name: values[end - n : end] for name, values in self.rewards.items()},
                correct=self.correct[end - n : end],
                lengths=self.lengths[end - n : end],
                truncated=self.truncated[end - n : end],
                num_calls=self.num_calls[end - n : end],
                failures=self.failures if i == 0 else {},
                texts=self.texts[end - n : end],
            )
            for i, (n, end) in enumerate(zip(counts, ends.tolist(), strict=True))
        ]


def _added(parts: Iterable[Mapping[str, tuple[int, str]]]) -> dict[str, tuple[int, str]]:
    """Counts by cause, each with its first prompt."""
    total: dict[str, tuple[int, str]] = {}
    for failures in parts:
        for cause, (count, first) in failures.items():
            before, kept = total.get(cause, (0, first))
            total[cause] = (before + count, kept)
    return total


class RewardModelCore:
    """A scorer and a tokenizer. `make_scorer` runs in the actor: rules are cheap, models need their own process."""

    def __init__(self, make_scorer: Callable[[], RewardScorer], tokenizer: str) -> None:
        self._make_scorer = make_scorer
        self._tokenizer_path = tokenizer

    def setup(self) -> Home:
        self.scorer = self._make_scorer()
        self.tokenizer = load_tokenizer(local_model(self._tokenizer_path))
        return Home.here()

    def score(self, batch: RolloutBatch, prompts: tuple[Prompt, ...], with_texts: bool = False) -> RewardTable:
        """Judge a batch. `prompts`: those of the batch, each once, in its order."""
        started = time.perf_counter()
        completions = self.completions(batch, prompts)
        # Nothing can be said of an episode whose environment failed.
        whole = np.array([c.finish_reason != "abort" for c in completions], bool)
        scores = self.scorer.score([c for c in completions if c.finish_reason != "abort"])
        return RewardTable(
            rewards={name: _spread(scores[name], whole) for name in self.scorer.reward_names},
            correct=_spread(scores["correct"], whole),
            lengths=np.array([c.num_tokens for c in completions], np.int32),
            truncated=np.array([c.finish_reason == "length" for c in completions], bool),
            num_calls=batch.num_calls,
            failures=self.scorer.failures,
            seconds=time.perf_counter() - started,
            texts=tuple(c.text for c in completions) if with_texts else (),
        )

    def score_each(self, prompts: Sequence[tuple[Prompt, ...]], *batches: RolloutBatch) -> list[RewardTable]:
        """Judge several batches at once, each with its prompts."""
        whole = self.score(RolloutBatch.concat(batches), tuple(prompt for of in prompts for prompt in of))
        return whole.split([len(batch) for batch in batches])

    def completions(self, batch: RolloutBatch, prompts: tuple[Prompt, ...]) -> list[Completion]:
        """The rollouts as text. Sample 0 begins a prompt's group."""
        responses = np.split(batch.response_ids, batch.response_offsets[1:-1])
        texts = self._decode(responses)
        num_tokens = np.diff(offsets_of(batch.loss_mask)[batch.response_offsets])
        prompt_of = np.cumsum(batch.sample_index == 0) - 1
        turns = self._turns(batch)
        return [
            Completion(
                prompts[prompt_of[i]],
                texts[i],
                int(num_tokens[i]),
                FINISH_REASONS[batch.finish_reason[i]],
                turns[i],
                int(batch.num_calls[i]),
                {name: float(values[i]) for name, values in batch.judged.items() if not np.isnan(values[i])},
            )
            for i in range(len(batch))
        ]

    def _turns(self, batch: RolloutBatch) -> list[tuple[Turn, ...]]:
        """Who wrote what in each rollout; nothing where nobody took turns."""
        counts = np.diff(batch.turn_offsets)
        if (counts <= 1).all():
            return [()] * len(batch)
        starts = batch.turn_starts + np.repeat(batch.response_offsets[:-1], counts)
        texts = self._decode(np.split(batch.response_ids, starts[1:]))
        turns = [Turn(text, bool(batch.loss_mask[start])) for text, start in zip(texts, starts, strict=True)]
        return [tuple(turns[begin:end]) for begin, end in pairwise(batch.turn_offsets.tolist())]

    def _decode(self, pieces: Sequence[np.ndarray]) -> list[str]:
        return self.tokenizer.batch_decode([piece.tolist() for piece in pieces], skip_special_tokens=True)


def _spread(values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """float32 `[R]`: values where `whole`, NaN elsewhere."""
    spread = np.full(len(whole), np.nan, np.float32)
    spread[whole] = values
    return spread


RewardModel = ray.remote(RewardModelCore)
