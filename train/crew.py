"""The actors of a run, and what the driver asks of them: generate, score, update, publish."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from ray import ObjectRef
from ray.actor import ActorHandle

from thornback.actors import (
    ActorPool,
    GenerationReport,
    LearnerGroup,
    LearnerSpec,
    OptimizerSpec,
    PolicySpec,
    PublishedWeights,
    Restarts,
    RewardModel,
    RewardTable,
    RolloutSpec,
    RolloutWorker,
    UpdateReport,
    UpdateSpec,
    WeightStore,
    actor_options,
)
from thornback.contracts import ENGINE_SIZES, EngineConfig, EnvironmentFailed, SamplingParams
from thornback.data import check_failures
from thornback.train.checkpoint import Checkpoint
from thornback.train.config import RunConfig
from thornback.train.draft_refresh import DraftRefresh
from thornback.train.problem import Problem
from thornback.train.prompts import PromptBatch
from thornback.train.speculation import RolloutSpeculation


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Rollouts that lie in the object store, piece by piece, and the prompts of each piece."""

    pieces: tuple[PromptBatch, ...]
    batches: tuple[ObjectRef, ...]
    reports: tuple[GenerationReport, ...]
    ahead: Mapping[str, float] = field(default_factory=dict)  # metrics of rollouts that run ahead

    @property
    def keys(self) -> tuple[str, ...]:
        """The prompts', in order."""
        return tuple(key for piece in self.pieces for key in piece.shard.keys)

    @property
    def num_tokens(self) -> int:
        return sum(report.num_tokens for report in self.reports)

    @property
    def failures(self) -> Counter[str]:
        """How many environments failed, by cause."""
        return sum((Counter(report.failures) for report in self.reports), Counter())

    @property
    def speculation(self) -> dict[str, float]:
        """What was guessed, under the keys of metrics.jsonl; nothing where nothing ever is."""
        counts = [report.speculation for report in self.reports if report.speculation is not None]
        if not counts:
            return {}
        drafts, accepted = sum(c.num_drafts for c in counts), sum(c.num_accepted_tokens for c in counts)
        return {
            "rollout/drafts": drafts,
            "rollout/draft_tokens": sum(c.num_draft_tokens for c in counts),
            "rollout/failed_drafts": sum(c.num_failures for c in counts),
            "rollout/accepted_per_draft": accepted / drafts if drafts else math.nan,
            "rollout/accepted_share": accepted / max(self.num_tokens, 1),
        }


class Crew:
    """Rollout workers, reward models, the weight store and, for training, the learner; and the learner of the draft
    head, where rollouts are guessed by one that follows the policy."""

    def __init__(
        self,
        config: RunConfig,
        model: str,
        problem: Problem,
        restarts: Restarts,
        with_learner: bool = True,
        speculation: RolloutSpeculation | None = None,
    ) -> None:
        self.config = config
        self.speculation = speculation
        self.episodes = problem.episodes
        self._published: PublishedWeights | None = None
        rollout_spec, timeout = rollout_spec_of(config, model, problem), config.run.timeout_seconds
        if speculation is not None:
            rollout_spec = speculation.spec(rollout_spec)
        rollout, scoring = config.rollout, config.scoring
        worker_class = RolloutWorker.options(**actor_options(rollout.num_cpus, rollout.num_gpus))
        judge_class = RewardModel.options(**actor_options(scoring.num_cpus))
        self.workers = ActorPool(
            "rollout worker",
            lambda _: worker_class.remote(rollout_spec),
            rollout.num_workers,
            timeout=timeout,
            restarts=restarts,
            catch_up=self._catch_up,
            elastic=rollout.max_staleness > 0,
        )
        self.judges = ActorPool(
            "reward model",
            lambda _: judge_class.remote(problem.make_scorer, model),
            scoring.num_workers,
            timeout=timeout,
            restarts=restarts,
        )
        self.draft: DraftRefresh | None = None
        if speculation is not None and config.rollout.refreshes_draft:
            self.draft = DraftRefresh(config, model, restarts)
        self.learner: LearnerGroup | None = None
        if with_learner:
            store_class = WeightStore.options(**actor_options())
            self.store = ActorPool(
                "weight store", lambda _: store_class.remote(), 1, timeout=timeout, restarts=restarts
            )
            learner = config.learner
            spec = learner_spec_of(config, model)
            self.learner = LearnerGroup(spec, learner.num_cpus, learner.num_gpus, restarts.on_event)

    def wait_ready(self) -> None:
        """Until workers and reward models are up."""
        # Rollouts that run ahead need not wait for the last worker: it joins when the cluster has a place for it.
        self.workers.wait_ready(at_least=1 if self.config.rollout.max_staleness else None)
        self.judges.wait_ready()
        if self.draft is not None:
            self.draft.wait_ready()

    def start_learner(self) -> LearnerGroup:
        """A fresh learner with the model that the run starts from, beside the other actors; raises `LearnerLost`."""
        assert self.learner is not None
        self.learner.start()
        self.wait_ready()
        self.store.wait_ready()
        return self.learner

    def generate(self, prompts: PromptBatch, sampling: SamplingParams, version: int, doing: str) -> Rollouts:
        """Answer every prompt with the weights of `version`, each worker its share."""
        pieces = tuple(prompts.split(len(self.workers)))
        calls = [(piece.shard, sampling, version, piece.prompts if self.episodes else ()) for piece in pieces]
        done = self.workers.map("generate", calls, f"generating rollouts of {doing}")
        rollouts = Rollouts(pieces, tuple(ref for ref, _ in done), tuple(report for _, report in done))
        self.check_environments(rollouts, sampling.n, doing)
        return rollouts

    def check_environments(self, rollouts: Rollouts, samples_per_prompt: int, doing: str) -> None:
        """Raise `EnvironmentFailed` where those of too many rollouts failed."""
        share = self.config.environment.max_failed_share
        check_environments(rollouts.failures, len(rollouts.keys) * samples_per_prompt, share, doing)

    def remember(self, rollouts: Rollouts, doing: str) -> None:
        """Where rollouts are guessed: guess later ones from these too. Workers sort them while others work."""
        if self.speculation is not None:
            self.speculation.remember(self.workers, rollouts.batches, doing)
        if self.draft is not None:
            self.draft.remember(rollouts.batches, rollouts.num_tokens)

    def recall(self, checkpoint: Checkpoint | None) -> None:
        """Where rollouts are guessed: guess from what a checkpoint holds, or from what the run begins with."""
        if self.speculation is not None:
            self.speculation.resume(self.workers, checkpoint)
        if self.draft is not None:
            self.draft.resume(self.workers, checkpoint)

    def save(self, location: str) -> None:
        """Write the actors' part of a checkpoint into the directory `location`."""
        assert self.learner is not None
        self.learner.save(location)
        if self.speculation is not None:
            self.speculation.save(self.workers, location)
        if self.draft is not None:
            self.draft.save(location)

    def rely_on(self, location: str) -> None:
        """A checkpoint is whole, and will be there until the next one is."""
        if self.speculation is not None:
            self.speculation.rely_on(location)

    def score(self, rollouts: Rollouts, doing: str, with_texts: bool = False) -> RewardTable:
        """Judge rollouts; only the table comes here. Raises `RewardError` where too many rewards fail."""
        pairs = zip(rollouts.batches, rollouts.pieces, strict=True)
        calls = [(batch, piece.prompts, with_texts) for batch, piece in pairs]
        return self.judged(self.judges.map("score", calls, f"judging rollouts of {doing}"))

    def judged(self, tables: list[RewardTable]) -> RewardTable:
        """Tables as one; raises `RewardError` where too many rewards failed."""
        table = RewardTable.concat(tables)
        check_failures(table.failures, len(table.lengths), self.config.scoring.max_failed_share)
        return table

    def update(self, rollouts: Rollouts, advantages: np.ndarray, step: int) -> UpdateReport:
        """Train on rollouts with one advantage each; raises `LearnerLost`."""
        assert self.learner is not None
        return self.learner.update(step, advantages, rollouts.batches)

    def publish(self, version: int) -> float:
        """Bring the learner's weights, as `version`, to every worker; returns the seconds that it took."""
        started = time.perf_counter()
        weights = self.make_public(version)
        self.workers.broadcast(
            "load_weights", (weights.buffer, weights.index, version), f"loading weights of version {version}"
        )
        return time.perf_counter() - started

    def make_public(self, version: int) -> PublishedWeights:
        """Put the learner's weights, as `version`, where workers can map them; nobody is told."""
        assert self.learner is not None
        call = (self.learner.ranks, version, 0.9 * self.config.run.timeout_seconds)
        self._published = self.store.map("publish", [call], f"publishing version {version}")[0]
        assert self._published is not None
        return self._published

    def draft_is_due(self, step: int) -> bool:
        """Whether rollouts are guessed by a draft head that is to learn after so many steps."""
        return self.draft is not None and self.draft.is_due(step)

    def refresh_draft(self, step: int, doing: str) -> dict[str, float]:
        """Let the draft head learn what the published policy says, and bring it to every worker; returns metrics."""
        assert self.draft is not None
        weights = self._latest()
        assert weights is not None
        return self.draft.refresh(self.workers, weights, step, doing)

    def _catch_up(self, worker: ActorHandle) -> list[ObjectRef]:
        """Bring a new worker to where the others are."""
        recalled = [] if self.speculation is None else self.speculation.catch_up(worker)
        drafted = [] if self.draft is None else self.draft.catch_up(worker)
        weights = self._latest()
        if weights is None:
            return [*recalled, *drafted]
        return [*recalled, *drafted, worker.load_weights.remote(weights.buffer, weights.index, weights.version)]

    def _latest(self) -> PublishedWeights | None:
        """The current version, which the store may have lost with its own death; None before the first."""
        if self._published is None:
            return None
        weights = self.store.map("latest", [()], "looking up the latest weights")[0]
        if weights is None or weights.version != self._published.version:
            weights = self.make_public(self._published.version)
        return weights

    def shutdown(self) -> None:
        """End every actor."""
        self.workers.shutdown()
        self.judges.shutdown()
        if self.draft is not None:
            self.draft.shutdown()
        if self.learner is not None:
            self.learner.shutdown()
            self.store.shutdown()


def check_environments(failures: Counter[str], num_rollouts: int, allowed_share: float, doing: str) -> None:
    """Raise `EnvironmentFailed` where the environments of more than this share of rollouts failed."""
    if failures.total() > allowed_share * num_rollouts:
        (cause, count), *_ = failures.most_common(1)
        raise EnvironmentFailed(
            f"The environments of {failures.total()} of {num_rollouts} rollouts failed in {doing}, {count} of them "
            f"by {cause}; mend that, or allow it with environment.max_failed_share."
        )


def rollout_spec_of(config: RunConfig, model: str, problem: Problem) -> RolloutSpec:
    """What a rollout worker of this run is made of."""
    rollout = config.rollout
    sizes = {name: value for name, value in rollout.engine_options.items() if name in ENGINE_SIZES}
    return RolloutSpec(
        model=model,
        engine=rollout.engine,
        engine_config=EngineConfig(**sizes),
        engine_options={name: value for name, value in rollout.engine_options.items() if name not in sizes},
        num_threads=rollout.num_threads,
        episodes=problem.episodes,
    )


def sampling_of(config: RunConfig) -> SamplingParams:
    """How training rollouts are drawn; each prompt's seed comes on top."""
    rollout = config.rollout
    return SamplingParams(
        n=rollout.samples_per_prompt,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
    )


def learner_spec_of(config: RunConfig, model: str) -> LearnerSpec:
    """What the learner of this run is made of."""
    algorithm, learner, lora = config.algorithm, config.learner, config.model.lora
    options = {
        "loss": algorithm.loss,
        "aggregation": algorithm.aggregation,
        "kl_weight": algorithm.kl_weight,
        "kl_kind": algorithm.kl_kind,
        "importance_cap": algorithm.importance_cap,
        **getattr(algorithm, algorithm.loss).model_dump(),
    }
    targets = () if lora is None else lora.target_modules
    return LearnerSpec(
        policy=PolicySpec(
            model=model,
            dtype=learner.dtype,
            strategy=learner.strategy,
            lora=None
            if lora is None
            else (lora.rank, lora.alpha, targets if isinstance(targets, str) else tuple(targets)),
            with_reference=algorithm.kl_weight > 0,
            gradient_checkpointing=learner.gradient_checkpointing,
            temperature=config.rollout.temperature,
        ),
        optimizer=OptimizerSpec(
            learning_rate=learner.learning_rate,
            schedule=learner.schedule,
            final_learning_rate_share=learner.final_learning_rate_share,
            warmup_steps=learner.warmup_steps,
            total_steps=config.run.steps,
            weight_decay=learner.weight_decay,
            betas=learner.betas,
            max_grad_norm=learner.max_grad_norm,
        ),
        update=UpdateSpec(
            loss_options=options,
            max_tokens=config.rollout.max_tokens,
            epochs_per_batch=learner.epochs_per_batch,
            updates_per_epoch=learner.updates_per_epoch,
            tokens_per_microbatch=learner.tokens_per_microbatch,
        ),
        num_ranks=learner.num_ranks,
        num_threads=learner.num_threads,
        timeout=config.run.timeout_seconds,
    )
