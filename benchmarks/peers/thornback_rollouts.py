"""A rollout worker as a training run has it, without the actor around it: epochs' rollouts again, plain or guessed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.epochs import Shard
from benchmarks.worker import TurnTaker
from thornback.actors import PromptShard, RolloutSpec
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import EngineConfig, RolloutBatch, SamplingParams, SpeculationConfig
from thornback.data import read_rollouts

MAX_TOKENS = 64
MEMORY_TOKENS = 1 << 22


def worker(model: str, threads: int, guess: bool, options: dict[str, Any]) -> RolloutWorkerCore:
    speculation = SpeculationConfig(**options) if guess else None
    config = EngineConfig(max_model_len=128, speculation=speculation)
    core = RolloutWorkerCore(RolloutSpec(model, engine_config=config, num_threads=threads, memory_tokens=MEMORY_TOKENS))
    core.setup()
    return core


def rollouts(turns: TurnTaker, threads: int, guess: bool, options: dict[str, Any], out: str, **work: Any) -> None:
    """`work`: `epochs`, each with its `policy`, the `reference` rollouts, the files of `earlier` epochs, and `shards`
    by how many sequences may live. A turn answers all of them; the tokens of the first turn go to the file `out`."""
    cores: list[RolloutWorkerCore] = []
    for epoch in work["epochs"]:
        core = worker(epoch["policy"], threads, guess, options)
        if guess:
            costs = cores[0].costs() if cores else core.costs()
            core.recall(costs, epoch["reference"], *map(read_rollouts, epoch["earlier"]))
        cores.append(core)
    while turns.wait():
        values: dict[str, float] = {}
        tokens: list[np.ndarray] = []
        for number, (core, epoch) in enumerate(zip(cores, work["epochs"], strict=True)):
            for live, shard in epoch["shards"].items():
                found, figures = answer(core, shard, int(live))
                tokens.append(found.response_ids)
                values |= {f"{name}_{live}_{number}": value for name, value in figures.items()}
        if not Path(out).exists():
            np.save(out, np.concatenate(tokens))
        turns.report(**values)


def answer(core: RolloutWorkerCore, shard: Shard, live: int) -> tuple[RolloutBatch, dict[str, float]]:
    """The rollouts of a shard, of which no more than `live` run at once, and what it took."""
    core.engine.scheduler.max_num_seqs = live  # type: ignore[attr-defined]
    prompts, seeds = zip(*shard, strict=True)
    keys = tuple(map(str, range(len(shard))))
    started = time.perf_counter()
    batch, report = core.generate(
        PromptShard(keys, tuple(map(tuple, prompts)), seeds), SamplingParams(max_tokens=MAX_TOKENS), 0
    )
    figures = {"seconds": time.perf_counter() - started, "tokens": float(report.num_tokens)}
    if report.speculation is not None:
        figures |= {"drafts": report.speculation.num_drafts, "accepted": report.speculation.num_accepted_tokens}
    return batch, figures
