"""What the jobs that train by Ray Train share: the job, the order of examples, the rate, the sum over workers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def fit(
    loop: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    storage: Path,
    *,
    name: str,
    num_workers: int,
    use_gpu: bool,
) -> None:
    """Run `loop(job)` on each of so many Ray Train workers; what Ray Train writes goes to a folder in `storage`, which
    every worker must see, and is gone afterwards. A lost worker starts the job over."""
    from ray import train as ray_train
    from ray.train.torch import TorchTrainer

    from thornback.engine import ACTOR_ENVIRONMENT
    from thornback.train.interrupt import ctrl_c_interrupts

    storage.mkdir(parents=True, exist_ok=True)
    place = tempfile.mkdtemp(prefix=f"{name}-", dir=storage.resolve())
    try:
        trainer = TorchTrainer(
            loop,
            train_loop_config=job,
            scaling_config=ray_train.ScalingConfig(
                num_workers=num_workers, use_gpu=use_gpu, resources_per_worker={"GPU": 1} if use_gpu else {"CPU": 1}
            ),
            run_config=ray_train.RunConfig(
                name=name,
                storage_path=place,
                failure_config=ray_train.FailureConfig(max_failures=3),
                worker_runtime_env={"env_vars": dict(ACTOR_ENVIRONMENT)},
            ),
        )
        with ctrl_c_interrupts():
            trainer.fit()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def batch_of(step: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """The examples of a step: each epoch is a permutation of all of them, cut into batches."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng([seed, int(epoch)]).permutation(count) for epoch in set(places // count)}
    return np.array([orders[p // count][p % count] for p in places])


def rate_share(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate as a share of its peak: up over the warm-up, then linearly down to a tenth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 1.0 - 0.9 * (step - warmup_steps) / max(steps - warmup_steps, 1)


def sum_over_workers(model: Any, loss: Any, world: int) -> Any:
    """Sum gradients in place over the workers; returns the summed loss."""
    if world > 1:
        import torch
        from torch import distributed

        flat = torch.nn.utils.parameters_to_vector(p.grad for p in model.parameters())
        flat = torch.cat([flat, loss[None]])
        distributed.all_reduce(flat)
        start = 0
        for p in model.parameters():
            p.grad.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()
        loss = flat[-1]
    return loss


def save_whole(model: Any, tokenizer_from: str, output: Path) -> None:
    """Write a model with its tokenizer to a temporary name, then rename, so that a directory of this name is always a
    whole model."""
    from transformers import AutoTokenizer

    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def use_threads(num_threads: int | None, local_world_size: int) -> None:
    """Torch's threads of a worker: so many, or its share of the node's cores."""
    import os

    import torch

    torch.set_num_threads(num_threads or max(1, len(os.sched_getaffinity(0)) // local_world_size))
