"""The reinforcement-learning loop. `step` is one training step, in the order in which things happen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from thornback.actors import DataLost, Restarts, RewardTable, UpdateReport
from thornback.contracts import Anchor
from thornback.data import read_anchors
from thornback.train.ahead import RolloutsAhead
from thornback.train.checkpoint import Checkpoints
from thornback.train.config import RunConfig
from thornback.train.crew import Crew, Rollouts, sampling_of
from thornback.train.evaluation import Evaluator, save_rollouts
from thornback.train.interrupt import Interrupt
from thornback.train.objective import Objective, reward_metrics
from thornback.train.prompts import PromptSource
from thornback.train.run_directory import RunDirectory


class Clock:
    """Seconds by phase, since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """`phase/<name>` of every phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return {f"phase/{name}": value for name, value in seconds.items()}


@dataclass
class Loop:
    """A run's training.

    `evaluator` None: it never evaluates. `anchors` None: it uses none; `refresh(step, name)` estimates them again
    with the current policy, into the run's file `name`.

    The weights' version is the number of steps behind them, and everything random derives from the step: a run
    that goes back to a checkpoint, because it was killed or because its learner was, repeats itself exactly.
    """

    config: RunConfig
    run: RunDirectory
    crew: Crew
    prompts: PromptSource
    objective: Objective
    evaluator: Evaluator | None
    checkpoints: Checkpoints
    restarts: Restarts
    anchors: dict[str, Anchor] | None
    refresh: Callable[[int, str], dict[str, Anchor]]
    on_step: Callable[[Mapping[str, Any]], None] = lambda metrics: None

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.sampling = sampling_of(self.config)
        self.first_anchors = self.anchors
        self.anchors_file: str | None = None  # of anchors that were estimated again
        self.ahead: RolloutsAhead | None = None
        if self.config.rollout.max_staleness:
            self.ahead = RolloutsAhead(self.config, self.crew, self.prompts, self.sampling)
            assert self.crew.learner is not None
            self.crew.learner.meanwhile = self.ahead.pump

    def train(self) -> int:
        """Go on from the latest checkpoint to the last step, or to an interruption; returns the steps done."""
        steps = self.config.run.steps
        with Interrupt() as interrupt:
            step = self.resume()
            while not interrupt.requested:
                try:
                    self.evaluate_if_due(step)
                    if step >= steps:
                        break
                    started = time.perf_counter()
                    metrics = self.step(step)
                    step += 1
                    self.record(step, metrics, time.perf_counter() - started)
                    if step % self.config.checkpoint.every == 0 or step == steps or interrupt.requested:
                        self.save(step)
                except DataLost as loss:
                    self.restarts.spend(str(loss))
                    step = self.resume()
        return step

    def step(self, step: int) -> dict[str, float]:
        """One batch: prompts, rollouts, rewards, advantages, update, and the new weights to every worker."""
        clock, crew, doing = self.clock, self.crew, f"step {step + 1}"
        rollouts, table = self.answers(step, doing)
        crew.remember(rollouts, doing)
        with clock.phase("advantage"):
            advantages = self.objective.advantages(table, self.sampling.n, rollouts.keys, self.anchors)
        with clock.phase("update"):
            report = crew.update(rollouts, advantages.values, step)
        with clock.phase("sync"):
            self.publish(version=step + 1)
        drafted = self.refresh_draft_if_due(step + 1, doing)
        self.keep_rollouts(step + 1, rollouts, table)
        self.refresh_anchors_if_due(step + 1)
        learned = reward_metrics(table) | advantages.metrics | report.metrics | drafted
        return learned | self.sizes(table, report, rollouts)

    def answers(self, step: int, doing: str) -> tuple[Rollouts, RewardTable]:
        """A step's rollouts, judged: made now, or those that have run ahead."""
        if self.ahead is not None:
            with self.clock.phase("rollout"):
                return self.ahead.take(step, doing)
        prompts = self.prompts.batch(step, self.anchors)
        with self.clock.phase("rollout"):
            rollouts = self.crew.generate(prompts, self.sampling, version=step, doing=doing)
        with self.clock.phase("reward"):
            return rollouts, self.crew.score(rollouts, doing)

    def publish(self, version: int) -> None:
        """New weights for every worker: at once, or as soon as it listens."""
        if self.ahead is None:
            self.crew.publish(version)
        else:
            self.ahead.tell(self.crew.make_public(version))

    def resume(self) -> int:
        """Start the learner from the latest checkpoint, or from the beginning; returns the steps that it has behind
        it. The way of a killed run and of a lost learner alike."""
        while True:
            try:
                return self._resume()
            except DataLost as loss:
                self.restarts.spend(str(loss))

    def _resume(self) -> int:
        checkpoint = self.checkpoints.latest()
        step = checkpoint.step if checkpoint else 0
        learner = self.crew.start_learner()
        self.anchors_file = None if checkpoint is None else checkpoint.state["anchors"]
        self.anchors = read_anchors(self.run.at(self.anchors_file)) if self.anchors_file else self.first_anchors
        if checkpoint is not None:
            learner.restore(checkpoint.location)
            self.run.event("resumed", f"going on after step {step}, from {checkpoint.location}")
        elif self.run.metrics.read():
            self.run.event("resumed", "starting again from the beginning, since there is no checkpoint yet")
        self.crew.recall(checkpoint)
        self.run.rewind(step)
        self.clock.take()
        if self.ahead is not None:
            self.ahead.stop()
        self.crew.publish(version=step)
        if self.ahead is not None:
            self.ahead.start(checkpoint.state.get("ahead") if checkpoint else None, self.anchors, step)
        return step

    def evaluate_if_due(self, step: int) -> None:
        """At intervals, and before and after the run; what a resumed run has evaluated already stands."""
        last = step == self.config.run.steps
        due = last or step % max(self.config.evaluation.every, 1) == 0
        if self.evaluator is None or not due or self.evaluator.has_evaluated(step):
            return
        with self.clock.phase("evaluate"):
            if self.ahead is not None:
                self.ahead.settle()
            self.evaluator.record(step, samples="before" if step == 0 else "after" if last else None)

    def refresh_draft_if_due(self, step: int, doing: str) -> dict[str, float]:
        """Where a draft head guesses rollouts, it follows the policy; returns metrics."""
        if not self.crew.draft_is_due(step):
            return {}
        with self.clock.phase("draft"):
            return self.crew.refresh_draft(step, doing)

    def refresh_anchors_if_due(self, step: int) -> None:
        anchors = self.config.anchors
        if anchors is None or anchors.refresh_every is None or step % anchors.refresh_every:
            return
        with self.clock.phase("anchors"):
            if self.ahead is not None:
                self.ahead.settle()
            self.anchors_file = f"anchors-step-{step}.parquet"
            self.anchors = self.refresh(step, self.anchors_file)
        if self.ahead is not None:
            self.ahead.use(self.anchors)
        self.run.event("anchors", f"estimated the anchors again with the policy after step {step}")

    def keep_rollouts(self, step: int, rollouts: Rollouts, table: RewardTable) -> None:
        if self.config.run.save_rollouts:
            with self.clock.phase("save_rollouts"):
                save_rollouts(self.run.at("rollouts", f"step-{step:06d}.parquet"), rollouts, table)

    def sizes(self, table: RewardTable, report: UpdateReport, rollouts: Rollouts) -> dict[str, float]:
        if report.num_skipped:
            self.run.event("update_skipped", f"{report.num_skipped} updates had a gradient that is not finite")
        failures = rollouts.failures
        for cause, count in failures.items():
            self.run.event("environment_failed", f"{count} rollouts: {cause}")
        for cause, (count, first) in table.failures.items():
            self.run.event("reward_failed", f"{count} rollouts, first on prompt {first}: {cause}")
        failed: dict[str, float] = {"rollout/failed_environments": failures.total()} if failures else {}
        if table.failures:
            failed["reward/failed"] = sum(count for count, _ in table.failures.values())
        sizes = {"num_rollouts": len(table.lengths), "tokens": rollouts.num_tokens}
        return sizes | rollouts.speculation | dict(rollouts.ahead) | failed

    def record(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """One row of metrics.jsonl; what is not a number is left out. Evaluation and checkpoint of the steps before
        show in the phases of this one."""
        row: dict[str, Any] = {"step": step, "time": time.time(), "version": step}
        row |= {key: value for key, value in metrics.items() if math.isfinite(value)}
        row |= self.clock.take() | {"step_seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        self.run.metrics.append(row)
        self.on_step(row)

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps."""
        with self.clock.phase("checkpoint"):
            self.run.flush()
            state = {"anchors": self.anchors_file, "ahead": self.ahead.state() if self.ahead is not None else None}
            location = self.checkpoints.save(step, state, self.crew.save)
            self.crew.rely_on(location)
