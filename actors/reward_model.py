"""The reward model: turns rollouts into text and judges them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import ray

from thornback.actors.locations import local_model
from thornback.actors.supervision import Home
from thornback.contracts import FINISH_REASONS, Completion, Prompt, RewardScorer, RolloutBatch, offsets_of
from thornback.data import load_tokenizer


@dataclass(frozen=True, slots=True)
class RewardTable:
    """The small part of scored rollouts, which the driver holds: one row a rollout, in the batch's order.

    `rewards[name]` float32 (NaN: does not apply), `correct` float32 in {0, 1}, `lengths` int32 (the model's own
    tokens), `truncated` bool (out of tokens before the end). `texts` only where they were asked for.
    """

    rewards: dict[str, np.ndarray]
    correct: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    seconds: float
    texts: tuple[str, ...] = ()

    @classmethod
    def concat(cls, tables: list[RewardTable]) -> RewardTable:
        """Tables end to end; the seconds are those of the slowest."""
        return cls(
            rewards={name: np.concatenate([t.rewards[name] for t in tables]) for name in tables[0].rewards},
            correct=np.concatenate([t.correct for t in tables]),
            lengths=np.concatenate([t.lengths for t in tables]),
            truncated=np.concatenate([t.truncated for t in tables]),
            seconds=max(t.seconds for t in tables),
            texts=tuple(text for t in tables for text in t.texts),
        )


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
        """Judge a batch. `prompts`: those of the batch, each once, in its order. Raises `RewardError`."""
        started = time.perf_counter()
        completions = self.completions(batch, prompts)
        scores = self.scorer.score(completions)
        return RewardTable(
            rewards={name: scores[name] for name in self.scorer.reward_names},
            correct=scores["correct"],
            lengths=np.array([c.num_tokens for c in completions], np.int32),
            truncated=np.array([c.finish_reason == "length" for c in completions], bool),
            seconds=time.perf_counter() - started,
            texts=tuple(c.text for c in completions) if with_texts else (),
        )

    def completions(self, batch: RolloutBatch, prompts: tuple[Prompt, ...]) -> list[Completion]:
        """The rollouts as text. Sample 0 begins a prompt's group."""
        responses = np.split(batch.response_ids, batch.response_offsets[1:-1])
        texts = self.tokenizer.batch_decode([r.tolist() for r in responses], skip_special_tokens=True)
        num_tokens = np.diff(offsets_of(batch.loss_mask)[batch.response_offsets])
        prompt_of = np.cumsum(batch.sample_index == 0) - 1
        return [
            Completion(prompts[prompt_of[i]], texts[i], int(num_tokens[i]), FINISH_REASONS[batch.finish_reason[i]])
            for i in range(len(batch))
        ]


RewardModel = ray.remote(RewardModelCore)
