"""thornback's training step: the run's own loop and actors, one `Loop.step` and its record a turn."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.problems import Problems
from benchmarks.worker import TurnTaker
from thornback.train import Trainer
from thornback.train.checkpoint import Checkpoints
from thornback.train.crew import Crew
from thornback.train.loop import Loop
from thornback.train.prompts import PromptSource
from thornback.train.session import Session


def settings(
    model: str, directory: str, processes: int, threads: int, prompts: int, samples: int, new_tokens: int
) -> dict[str, Any]:
    """A recipe: `processes` rollout workers, and then as many learner ranks, of `threads` threads each."""
    return {
        "run": {"dir": directory, "steps": 1_000_000},
        "model": {"path": model},
        "data": {"prompts_per_step": prompts, "shuffle": False},
        "rollout": {
            "num_workers": processes,
            "num_threads": threads,
            "samples_per_prompt": samples,
            "max_tokens": new_tokens,
            "temperature": 1.0,
        },
        "algorithm": {"estimator": "dvao", "kl_weight": 0.0},
        "learner": {"num_ranks": processes, "num_threads": threads, "learning_rate": 1e-6, "epochs_per_batch": 1},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 1_000_000},
    }


def step(turns: TurnTaker, **options: Any) -> None:
    trainer = Trainer(settings(**options), data=Problems())
    config = trainer.config
    with Session.open(config, trainer.problem) as session:
        crew = Crew(config, session.model, session.problem, session.restarts)
        loop = Loop(
            config=config,
            run=session.run,
            crew=crew,
            prompts=PromptSource(
                session.train_prompts, config.run.seed, config.data.prompts_per_step, config.data.shuffle
            ),
            objective=trainer.objective,
            evaluator=None,
            checkpoints=Checkpoints(session.run, config.checkpoint.keep),
            restarts=session.restarts,
            anchors=None,
            refresh=lambda step, name: {},
        )
        phases: dict[str, float] = {}
        loop.on_step = lambda row: phases.update((k, v) for k, v in row.items() if k.startswith("phase/"))
        number = loop.resume()
        while turns.wait():
            started = time.perf_counter()
            metrics = loop.step(number)
            number += 1
            loop.record(number, metrics, time.perf_counter() - started)
            turns.report(seconds=time.perf_counter() - started, tokens=metrics["tokens"], **phases)
        crew.shutdown()
