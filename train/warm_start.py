"""Supervised warm start: a model learns the shape of an answer from demonstrations, through Ray Train."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thornback.contracts import ConfigError, DataError
from thornback.train.config import RunConfig
from thornback.train.fitting import batch_of, fit, rate_share, save_whole, sum_over_workers, use_threads
from thornback.train.sections import WarmStartSection


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt with its answer, from `start` on; `mask`, one for each token of the answer, says which the
    model wrote (None: all)."""

    token_ids: tuple[int, ...]
    start: int
    mask: tuple[int, ...] | None = None


def tokenized(tokenizer: Any, demonstrations: Sequence[Any], system_prompt: str | None = None) -> list[Example]:
    """Demonstrations (`.prompt`, and `.completion` or `.turns`) as tokens, each of the model's turns ended by the
    end-of-sequence token, and what an environment says between them as rollouts have it."""
    from thornback.data import render_prompt, render_reply

    examples = []
    for demonstration in demonstrations:
        prompt = render_prompt(tokenizer, demonstration.prompt.messages, system_prompt)
        tokens, mask = [], []
        for turn in getattr(demonstration, "turns", ()) or (demonstration.completion,):
            by_model = isinstance(turn, str)
            if by_model:
                said = [*tokenizer(turn, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            else:
                said = render_reply(tokenizer, turn)
            tokens += said
            mask += [int(by_model)] * len(said)
        examples.append(Example((*prompt, *tokens), len(prompt), tuple(mask)))
    return examples


def warm_start(config: RunConfig, task: Any, model: str | Path, output: str | Path) -> dict[str, float]:
    """Warm `model` up on demonstrations of `task`, as `config.warm_start` says; see `supervise`.

    Raises `ConfigError` for a task that gives no demonstrations.
    """
    from transformers import AutoTokenizer

    section = config.warm_start
    assert section is not None, "warm_start is called for configurations that ask for one"
    if not hasattr(task, "demonstrations"):
        raise ConfigError(
            f"The task {task.name} gives no demonstrations: leave warm_start out, or give the task a method "
            "demonstrations(count, seed, **options)."
        )
    made = task.demonstrations(section.num_demonstrations, config.run.seed, **section.options)
    examples = tokenized(AutoTokenizer.from_pretrained(model), made, task.system_prompt)
    metrics = Path(output).with_name(f"{Path(output).name}-metrics.jsonl")
    threads, use_gpu = config.learner.num_threads, config.learner.num_gpus > 0
    return supervise(
        model, examples, output, section, seed=config.run.seed, num_threads=threads, use_gpu=use_gpu,
        metrics_path=metrics,
    )  # fmt: skip


def supervise(
    model: str | Path,
    examples: Sequence[Example],
    output: str | Path,
    section: WarmStartSection,
    *,
    seed: int = 0,
    num_threads: int | None = None,
    use_gpu: bool = False,
    metrics_path: str | Path | None = None,
) -> dict[str, float]:
    """Train `model` (a directory) on `examples` and write it to `output`, in Hugging Face layout.

    `section.steps` optimizer steps of `section.batch_size` examples on `section.num_workers` Ray Train workers; the
    same seed, workers and threads give the same weights. Directories must be visible to every worker. A line of
    JSON (step, loss, seconds) goes to `metrics_path` every 20 steps; the last is returned. A lost worker starts the
    job over.
    """
    if not examples:
        raise DataError("The warm start has no demonstrations; give warm_start.num_demonstrations at least 1.")
    output = Path(output)
    with tempfile.TemporaryDirectory(prefix="warm-start-", dir=_made(output.parent)) as storage:
        job: dict[str, Any] = {
            "model": str(model),
            "output": str(output),
            "tokens": np.concatenate([np.asarray(e.token_ids, np.int32) for e in examples]),
            "lengths": np.asarray([len(e.token_ids) for e in examples], np.int64),
            "starts": np.asarray([e.start for e in examples], np.int64),
            "weights": np.concatenate([_weights(e, section.environment_weight) for e in examples]),
            "section": section.model_dump(),
            "seed": seed,
            "num_threads": num_threads,
            "metrics_path": str(metrics_path or Path(storage, "metrics.jsonl")),
        }
        fit(_train, job, Path(storage), name="warm-start", num_workers=section.num_workers, use_gpu=use_gpu)
        return json.loads(Path(job["metrics_path"]).read_text().splitlines()[-1])


def _weights(example: Example, environment_weight: float) -> np.ndarray:
    """float32, the weight of each token's loss: 1 where the model wrote, 0 in the prompt."""
    weights = np.zeros(len(example.token_ids), np.float32)
    weights[example.start :] = 1.0 if example.mask is None else np.where(example.mask, 1.0, environment_weight)
    return weights


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


def _train(job: dict[str, Any]) -> None:
    """One worker: its share of every batch, gradients summed over the workers."""
    import torch
    from ray import train as ray_train

    from thornback.engine import load_model, sequence_logprobs

    context = ray_train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    use_threads(job["num_threads"], context.get_local_world_size())
    section = WarmStartSection(**job["section"])
    model = load_model(job["model"], device="cuda" if torch.cuda.is_available() else "cpu", dtype="float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=section.learning_rate, weight_decay=0.0, fused=True)
    sequences, weights = (np.split(job[name], np.cumsum(job["lengths"])[:-1]) for name in ("tokens", "weights"))
    metrics: dict[str, float] = {}
    began = time.monotonic()
    for step in range(section.steps):
        batch = batch_of(step, len(sequences), section.batch_size, job["seed"])
        total_weight = sum(float(weights[i].sum()) for i in batch)
        mine = batch[rank::world]
        logprobs, _ = sequence_logprobs(model, [sequences[i] for i in mine], job["starts"][mine].tolist())
        mine_weighted = torch.from_numpy(np.concatenate([weights[i][job["starts"][i] :] for i in mine]))
        loss = -(logprobs * mine_weighted.to(logprobs.device)).sum() / total_weight
        loss.backward()
        total = sum_over_workers(model, loss.detach(), world)
        for group in optimizer.param_groups:
            group["lr"] = section.learning_rate * rate_share(step, section.steps, section.warmup_steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step % 20 == 19 or step == section.steps - 1) and rank == 0:
            metrics = {"step": step + 1, "loss": float(total), "seconds": time.monotonic() - began}
            with open(job["metrics_path"], "w" if step < 20 else "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
    if rank == 0:
        save_whole(model, job["model"], Path(job["output"]))
    ray_train.report(metrics)
