"""A short training run like the demo's, with the policy at the beginning of each of its epochs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from thornback.contracts import RolloutBatch
from thornback.data import read_rollouts
from thornback.demo_tasks import DEMOS
from thornback.train import Trainer, make_config
from thornback.train.cluster import cluster
from thornback.train.prompts import seed_of

SEED = 0
Shard = list[tuple[list[int], int]]  # token ids of a prompt, and a seed


def epoch_settings(directory: Path, prompts_per_step: int, steps_per_epoch: int, warm_steps: int) -> dict[str, Any]:
    """The demo's settings, but for these: fewer prompts, all of them kept, so that an epoch is short; a learning rate
    that does not know where the run ends; no evaluation; and rollouts are speculated and kept."""
    values: dict[str, Any] = {name: dict(section) for name, section in DEMOS["arithmetic"].settings.items()}
    values["run"] = {"dir": str(directory), "seed": SEED, "save_rollouts": True}
    values["task"]["options"] = values["task"]["options"] | {"num_train": prompts_per_step * steps_per_epoch}
    values["data"] = {"prompts_per_step": prompts_per_step}
    values["rollout"] |= {"speculate": "rasd"}
    values["learner"] |= {"schedule": "constant"}
    values["warm_start"] |= {"steps": warm_steps}
    values["anchors"] |= {"drop_solved": False, "drop_unsolved": False}
    values["evaluation"] = {"every": 0}
    return values


def train_epochs(directory: Path, num_epochs: int, steps_per_epoch: int, **settings: int) -> list[Path]:
    """Train for so many epochs; the model directories of the policies that began them."""
    values = epoch_settings(directory, steps_per_epoch=steps_per_epoch, **settings)
    policies = [directory / "warm"]
    with cluster(None):
        for epoch in range(1, num_epochs + 1):  # a run goes on when its last step is moved
            values["run"]["steps"] = epoch * steps_per_epoch
            Trainer(make_config(values)).train()
            policies.append(directory / f"policy-{epoch}")
            shutil.copytree(directory / "model", policies[-1])
    return policies[:num_epochs]


def rollout_files(directory: Path, epoch: int, steps_per_epoch: int) -> list[str]:
    """The rollouts of an epoch, counted from 0, in order."""
    steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    return [str(directory / "rollouts" / f"step-{step + 1:06d}.parquet") for step in steps]


def long_tailed(files: list[str], epoch: int, count: int, shortest: int = 8, longest: int = 64) -> Shard:
    """`count` rollouts of an epoch whose lengths are as near as can be to the quantiles of a Pareto distribution from
    `shortest` to `longest` tokens."""
    shape = np.log(2 * count) / np.log(longest / shortest)
    wanted = shortest * (1 - (np.arange(count) + 0.5) / count) ** (-1 / shape)
    batch = RolloutBatch.concat([read_rollouts(file) for file in files])
    left = batch.response_lengths.astype(float)
    chosen = []
    for length in wanted[::-1]:  # the long ones are rare: they choose first
        chosen.append(int(np.argmin(np.abs(left - length))))
        left[chosen[-1]] = np.inf
    return singles(batch, epoch, chosen)


def singles(batch: RolloutBatch, epoch: int, rows: Iterable[int]) -> Shard:
    """Each of these rollouts of an epoch as a request of its own: the prompt's token ids, and the seed."""
    return [
        (batch.prompt(i).tolist(), seed_of(SEED, "train", batch.prompt_keys[i], epoch) + int(batch.sample_index[i]))
        for i in rows
    ]
