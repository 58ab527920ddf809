"""Evaluation on the held-out prompts, through the same workers that training uses; and rollouts as files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from thornback.actors import RewardTable
from thornback.contracts import Prompt, RolloutBatch, SamplingParams
from thornback.data import write_rollouts
from thornback.train.config import RunConfig
from thornback.train.crew import Crew, Rollouts, sampling_of
from thornback.train.objective import reward_metrics
from thornback.train.prompts import TokenizedPrompt, make_prompt_batch, seed_of
from thornback.train.run_directory import RunDirectory


class Evaluator:
    """Answers the held-out prompts once each, sampled at the training temperature and, if asked for, greedily."""

    def __init__(self, config: RunConfig, run: RunDirectory, crew: Crew, prompts: Sequence[TokenizedPrompt]) -> None:
        self._config = config
        self._run = run
        self._crew = crew
        # The same seeds at every evaluation: two policies differ by what they are, not by luck.
        seeds = [seed_of(config.run.seed, "evaluation", p.prompt.key) for p in prompts]
        self._prompts = make_prompt_batch(prompts, seeds)

    def modes(self) -> dict[str, SamplingParams]:
        """How to answer, by name."""
        max_tokens = self._config.evaluation.max_tokens or self._config.rollout.max_tokens
        sampled = replace(sampling_of(self._config), n=1, max_tokens=max_tokens)
        greedy = replace(sampled, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        return {"sampled": sampled, "greedy": greedy} if self._config.evaluation.greedy else {"sampled": sampled}

    def has_evaluated(self, step: int) -> bool:
        """Whether evaluation.jsonl has every mode of `step`."""
        found = {row["mode"] for row in self._run.evaluation.read() if row["step"] == step}
        return found >= set(self.modes())

    def evaluate(self, step: int, version: int, samples: str | None = None) -> list[dict[str, Any]]:
        """Measure the policy after `step` steps, which the workers hold as `version`: one row a mode.

        `samples`: "before" or "after" keeps the first sampled answers as samples_<that>.parquet.
        """
        rows = []
        for mode, sampling in self.modes().items():
            doing = f"the {mode} evaluation after step {step}"
            rollouts = self._crew.generate(self._prompts, sampling, version, doing)
            table = self._crew.score(rollouts, doing, with_texts=samples is not None and mode == "sampled")
            rows.append({"step": step, "mode": mode, **evaluation_row(table)})
            if table.texts:
                self._save_samples(f"samples_{samples}.parquet", table)
        return rows

    def record(self, step: int, samples: str | None = None) -> None:
        """Measure during training, into evaluation.jsonl. All modes at once: after a kill in between, the resumed
        run measures again."""
        for row in self.evaluate(step, step, samples):
            self._run.evaluation.append(row)

    def _save_samples(self, name: str, table: RewardTable) -> None:
        count = min(self._config.evaluation.num_saved_samples, len(self._prompts.prompts))
        if count:
            self._run.write_table(name, samples_table(self._prompts.prompts[:count], table))


def evaluation_row(table: RewardTable) -> dict[str, Any]:
    """The figures of one evaluation, under the keys of evaluation.jsonl."""
    metrics = reward_metrics(table)
    row: dict[str, Any] = {"accuracy": metrics["accuracy"]}
    row |= {
        f"reward/{name}": metrics[f"reward/{name}/mean"] for name in table.rewards if f"reward/{name}/mean" in metrics
    }
    row |= {"response_length": metrics["response_length"], "truncated_fraction": metrics["truncated_fraction"]}
    row |= {"tool_calls": metrics["tool_calls"]} if "tool_calls" in metrics else {}
    return {k: v for k, v in row.items() if math.isfinite(v)} | {"num_prompts": len(table.lengths)}


def samples_table(prompts: Sequence[Prompt], table: RewardTable) -> pa.Table:
    """Answers to these prompts, which are the table's first, as people read them."""
    n = len(prompts)
    columns = {
        "prompt_key": pa.array([p.key for p in prompts], pa.string()),
        "prompt": pa.array(["\n".join(m["content"] for m in p.messages) for p in prompts], pa.string()),
        "completion": pa.array(table.texts[:n], pa.string()),
        "answer": pa.array([p.answer for p in prompts], pa.string()),
        "correct": pa.array(table.correct[:n] > 0),
        "num_tokens": pa.array(table.lengths[:n]),
    }
    return pa.table(columns | {f"reward.{name}": pa.array(values[:n]) for name, values in table.rewards.items()})


def save_rollouts(location: str, rollouts: Rollouts, table: RewardTable) -> None:
    """Scored rollouts as one Parquet file, through the data room's writer."""
    batch = RolloutBatch.concat(ray.get(list(rollouts.batches)))
    write_rollouts(batch.with_scores(table.rewards, table.correct), location)
