"""The job behind `thornback draft`: a draft head learns to guess what its target thinks next (papers.md section 3)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from thornback.contracts import DataError, EngineConfig, Request, SamplingParams
from thornback.data import load_tokenizer, read_documents
from thornback.train.fitting import batch_of, fit, rate_share, sum_over_workers, use_threads

_HELD_OUT = 20  # one sequence in so many says how good a head is
_REPORT = 20  # steps between lines of metrics
_SMALLEST = 8  # tokens of a sequence that is worth learning from


class DraftConfig(BaseModel):
    """How a draft head is made."""

    model_config = ConfigDict(extra="forbid")

    prompt_tokens: PositiveInt = 64
    """Tokens of each document that the target goes on from."""
    max_tokens: NonNegativeInt = 128
    """Tokens that the target says at most; 0: documents are what it has said already, such as rollouts."""
    temperature: float = 1.0
    """Of what the target says."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Sequences of a step."""
    learning_rate: PositiveFloat = 1e-3
    """AdamW's peak learning rate; it decays linearly to a tenth."""
    warmup_steps: NonNegativeInt = 50
    """Steps over which the learning rate rises from 0."""
    depth: PositiveInt = 3
    """Guesses in a row that are trained, each on the one before."""
    num_workers: PositiveInt = 1
    """Ray Train workers."""
    seed: int = 0
    """Of everything that is drawn."""


def train_draft(
    model: str,
    output: str | Path,
    sources: Sequence[str],
    config: DraftConfig | None = None,
    *,
    column: str = "text",
    max_bad_rows: int = 0,
    num_threads: int | None = None,
    use_gpu: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a draft head for `model` (a directory) on what it says after the beginnings of the documents in `sources`,
    and write it to `output`. Returns the last metrics: `agreement[i]` is how often the head's first choice for the
    token i + 1 places ahead is the target's, on sequences that it did not learn from. Raises `DataError`."""
    config = config or DraftConfig()
    documents = read_documents(sources, load_tokenizer(model), column).checked(max_bad_rows)
    sequences = documents if config.max_tokens == 0 else said_by(model, documents, config, num_threads, say)
    sequences = [s for s in sequences if len(s) >= _SMALLEST]
    if len(sequences) < 2:
        raise DataError(f"The sources give {len(sequences)} sequences of {_SMALLEST} tokens or more; give hundreds.")
    say(f"training on {sum(map(len, sequences)):,} tokens")
    metrics_path = Path(output).with_name(f"{Path(output).name}-metrics.jsonl")
    metrics_path.parent.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {
        # Ray Train's workers run in a directory of their own, where relative paths lead nowhere.
        "model": str(Path(model).resolve() if Path(model).is_dir() else model),
        "output": str(Path(output).resolve()),
        "tokens": np.concatenate(sequences).astype(np.int32),
        "lengths": np.asarray([len(s) for s in sequences], np.int64),
        "config": config.model_dump(),
        "num_threads": num_threads,
        "metrics_path": str(metrics_path.resolve()),
    }
    fit(_train, job, metrics_path.parent, name="draft", num_workers=config.num_workers, use_gpu=use_gpu)
    return json.loads(metrics_path.read_text().splitlines()[-1])


def said_by(
    model: str,
    documents: Sequence[np.ndarray],
    config: DraftConfig,
    num_threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[np.ndarray]:
    """Each document's beginning and what the target says after it: token ids."""
    from thornback.engine import TorchEngine, generate

    engine = TorchEngine(model, EngineConfig(num_threads=num_threads))
    longest = engine.max_model_len - 1
    prompts = [tuple(d[: min(config.prompt_tokens, longest)].tolist()) for d in documents if len(d)]
    say(f"{model} goes on from {len(prompts):,} beginnings")
    sampling = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed)
    requests = [Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
    drawn = generate(engine, requests)
    return [np.append(np.asarray(r.prompt_token_ids, np.int64), drawn[r.request_id][0].token_ids) for r in requests]


def _train(job: dict[str, Any]) -> None:
    """One worker: its share of every batch, gradients summed over the workers."""
    import torch
    from ray import train as ray_train

    from thornback.engine import load_model
    from thornback.engine.draft_head import DraftHead
    from thornback.engine.draft_training import agreement_of, losses

    context, config = ray_train.get_context(), DraftConfig(**job["config"])
    rank, world = context.get_world_rank(), context.get_world_size()
    use_threads(job["num_threads"], context.get_local_world_size())
    target = load_model(job["model"], device="cuda" if torch.cuda.is_available() else "cpu", dtype="float32")
    target.requires_grad_(False)
    head = DraftHead.new(target, seed=config.seed).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    sequences = np.split(job["tokens"].astype(np.int64), np.cumsum(job["lengths"])[:-1])
    held_out, learned = sequences[::_HELD_OUT], [s for i, s in enumerate(sequences) if i % _HELD_OUT]
    rng = np.random.default_rng([config.seed, rank])
    metrics: dict[str, Any] = {}
    for step in range(config.steps):
        mine = batch_of(step, len(learned), config.batch_size, config.seed)[rank::world]
        loss, _ = losses(head, target, [learned[i] for i in mine], config.depth, rng)
        (loss / world).backward()
        total = sum_over_workers(head, loss.detach() / world, world)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_share(step, config.steps, config.warmup_steps)
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step == config.steps - 1
        if rank == 0 and (step % _REPORT == _REPORT - 1 or last):
            metrics = {"step": step + 1, "loss": float(total)}
            if last:
                metrics["agreement"] = agreement_of(head, target, held_out, config.depth, config.batch_size)
            with open(job["metrics_path"], "w" if step < _REPORT else "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
    if rank == 0:
        _save(head, Path(job["output"]))
    ray_train.report({"step": config.steps})


def _save(head: Any, output: Path) -> None:
    """Write to a temporary name, then rename, so that a directory of this name is always a whole head."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    head.save(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
