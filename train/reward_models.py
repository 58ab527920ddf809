"""The job behind `thornback reward-model`: a model learns from preference pairs to tell good answers from bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from thornback.contracts import DataError
from thornback.data import load_tokenizer, read_preferences
from thornback.train.fitting import batch_of, fit, rate_share, save_whole, sum_over_workers, use_threads

_HELD_OUT = 20  # one pair in so many says how good it is
_REPORT = 20  # steps between lines of metrics


class RewardModelConfig(BaseModel):
    """How a reward model is made."""

    model_config = ConfigDict(extra="forbid")

    steps: PositiveInt = 500
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Pairs of a step."""
    learning_rate: PositiveFloat = 1e-5
    """AdamW's peak learning rate; it decays linearly to a tenth."""
    warmup_steps: NonNegativeInt = 20
    """Steps over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    max_length: PositiveInt = 4096
    """Of longer conversations the end counts, in tokens."""
    num_workers: PositiveInt = 1
    """Ray Train workers."""
    seed: int = 0
    """Of the order of pairs, and of the new output."""


def train_reward_model(
    model: str,
    output: str | Path,
    sources: Sequence[str],
    config: RewardModelConfig | None = None,
    *,
    max_bad_rows: int = 0,
    num_threads: int | None = None,
    use_gpu: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train `model` (a directory or hub name), with a new output in place of its head, by Bradley and Terry's
    likelihood: log sigmoid(score(chosen) - score(rejected)), and write it to `output`.

    Returns the last metrics, `loss` and `accuracy` among them: of pairs that it did not learn from, the share whose
    chosen answer scores higher. Raises `DataError` and `ModelError`.
    """
    from thornback.data.reward_model import conversation

    config = config or RewardModelConfig()
    pairs = read_preferences(sources, max_bad_rows)
    if len(pairs) < 2:
        raise DataError("There is one preference pair; give hundreds.")
    tokenizer = load_tokenizer(model)
    said = [
        np.asarray(conversation(tokenizer, pair.messages, answer)[-config.max_length :], np.int32)
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]
    say(f"training on {len(pairs):,} pairs of {np.mean([len(s) for s in said]):.0f} tokens")
    metrics_path = Path(output).with_name(f"{Path(output).name}-metrics.jsonl").resolve()
    metrics_path.parent.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {
        # Ray Train's workers run in a directory of their own, where relative paths lead nowhere.
        "model": str(Path(model).resolve() if Path(model).is_dir() else model),
        "output": str(Path(output).resolve()),
        "tokens": np.concatenate(said),
        "lengths": np.asarray([len(s) for s in said], np.int64),
        "config": config.model_dump(),
        "num_threads": num_threads,
        "metrics_path": str(metrics_path),
    }
    fit(_train, job, metrics_path.parent, name="reward-model", num_workers=config.num_workers, use_gpu=use_gpu)
    return json.loads(metrics_path.read_text().splitlines()[-1])


def _train(job: dict[str, Any]) -> None:
    """One worker: its share of every batch, gradients summed over the workers."""
    import torch
    from ray import train as ray_train
    from torch.nn.functional import logsigmoid

    from thornback.data.reward_model import classify, load_classifier

    context, config = ray_train.get_context(), RewardModelConfig(**job["config"])
    rank, world = context.get_world_rank(), context.get_world_size()
    use_threads(job["num_threads"], context.get_local_world_size())
    torch.manual_seed(config.seed)
    model = load_classifier(job["model"], load_tokenizer(job["model"]), num_labels=1)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    said = np.split(job["tokens"], np.cumsum(job["lengths"])[:-1])
    pairs = np.arange(len(said) // 2)
    held_out = pairs[:: min(_HELD_OUT, len(pairs))]
    learned = np.setdiff1d(pairs, held_out)

    def margins(rows: np.ndarray) -> Any:
        scores = classify(model, [said[2 * i + other] for i in rows for other in (0, 1)])[:, 0]
        return scores[::2] - scores[1::2]

    for step in range(config.steps):
        batch = learned[batch_of(step, len(learned), config.batch_size, config.seed)]
        loss = -logsigmoid(margins(batch[rank::world])).sum() / len(batch)
        loss.backward()
        total = sum_over_workers(model, loss.detach(), world)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_share(step, config.steps, config.warmup_steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0 and (step % _REPORT == _REPORT - 1 or step == config.steps - 1):
            with torch.inference_mode():
                right = torch.cat([margins(rows) > 0 for rows in np.array_split(held_out, -(-len(held_out) // 32))])
            row = {"step": step + 1, "loss": float(total), "accuracy": float(right.float().mean())}
            with open(job["metrics_path"], "w" if step < _REPORT else "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if rank == 0:
        save_whole(model, job["model"], Path(job["output"]))
    ray_train.report({})
