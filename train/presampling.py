"""Pre-sampling (PVPO): reference rollouts of each prompt give anchors, and say which prompts are worth training on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.fs as pafs
import ray
from ray import ObjectRef
from ray import data as ray_data

from thornback.actors import ActorPool, AnchorSampler, Restarts, actor_options, anchors_of
from thornback.actors.locations import exists, local_model
from thornback.algorithms import fate
from thornback.contracts import (
    Anchor,
    ConfigError,
    DataError,
    anchors_from_arrow,
    anchors_to_arrow,
)
from thornback.data import load_tokenizer, read_anchors
from thornback.train.config import RunConfig
from thornback.train.crew import Crew, check_environments, rollout_spec_of, sampling_of
from thornback.train.problem import Problem
from thornback.train.prompts import PromptBatch, TokenizedPrompt, make_prompt_batch, seed_of
from thornback.train.run_directory import RunDirectory
from thornback.train.session import Session
from thornback.train.speculation import REFERENCE

ANCHORS_FILE = "anchors.parquet"
PROMPTS_PER_CALL = 64  # a lost call costs its prompts' rollouts, and a call's rollouts fill an engine's batch


@dataclass(frozen=True)
class Presampler:
    """Samples anchors with a model that does not change."""

    config: RunConfig
    run: RunDirectory
    problem: Problem
    restarts: Restarts

    def write(self, prompts: Sequence[TokenizedPrompt], model: str, name: str = ANCHORS_FILE) -> None:
        """Estimate every prompt's anchors with `model` and write them to the run's file `name`.

        Where a larger model is configured, it is asked about the prompts that `model` never solves; its first
        right answer is cached with them. Raises `ConfigError` if the two models do not share their tokenizer.
        """
        settings = self.config.anchors
        assert settings is not None
        if settings.larger_model is not None:
            check_same_tokenizer(model, settings.larger_model)
        tables = ray.get(self._sample(prompts, model, settings.num_rollouts, keep_trajectory=False))
        anchors = anchors_from_arrow(pa.concat_tables(tables))
        if settings.larger_model is not None:
            unsolved = [p for p in prompts if fate(anchors[p.prompt.key].accuracy) == "ask"]
            anchors |= self._ask(unsolved, anchors, settings.larger_model, settings.larger_model_rollouts)
        write_anchors(self.run, name, list(anchors.values()))
        self.run.event("anchors", f"estimated the anchors of {len(anchors)} prompts into {name}")

    def _ask(
        self, prompts: Sequence[TokenizedPrompt], anchors: Mapping[str, Anchor], model: str, num_rollouts: int
    ) -> dict[str, Anchor]:
        """The anchors of these prompts, with the larger model's right answers to them."""
        if not prompts:
            return {}
        found = anchors_from_arrow(pa.concat_tables(ray.get(self._sample(prompts, model, num_rollouts, True))))
        return {key: replace(anchors[key], trajectory=answer.trajectory) for key, answer in found.items()}

    def _sample(
        self, prompts: Sequence[TokenizedPrompt], model: str, num_rollouts: int, keep_trajectory: bool
    ) -> list[ObjectRef]:
        """Arrow tables of anchors, in the order of the prompts, in the object store."""
        rollout = self.config.rollout
        spec = rollout_spec_of(self.config, model, self.problem)
        share = self.config.scoring.max_failed_share
        sampler_class = AnchorSampler.options(**actor_options(rollout.num_cpus, rollout.num_gpus))
        pool = ActorPool(
            "anchor sampler",
            lambda _: sampler_class.remote(spec, self.problem.make_scorer, share),
            rollout.num_workers,
            timeout=self.config.run.timeout_seconds,
            restarts=self.restarts,
        )
        try:
            pool.wait_ready()
            sampling = replace(sampling_of(self.config), n=num_rollouts)
            batches = anchor_batches(self.config, prompts, "larger" if keep_trajectory else "reference")
            keep = rollout.speculate == "rasd" and not keep_trajectory
            calls = [
                (batch.shard, batch.prompts, sampling, keep_trajectory, self._reference(number) if keep else None)
                for number, batch in enumerate(batches)
            ]
            doing = f"sampling anchors with {model}"
            done = pool.map("sample", calls, doing)
            failures = sum((Counter(report.failures) for _, report in done), Counter())
            check_environments(failures, len(prompts) * num_rollouts, self.config.environment.max_failed_share, doing)
            return [ref for ref, _ in done]
        finally:
            pool.shutdown()

    def _reference(self, number: int) -> str:
        """Where the rollouts of a call are kept for the training's rollouts to be guessed from."""
        return self.run.at(REFERENCE, f"part-{number:05d}.parquet")


def anchors_for(session: Session) -> dict[str, Anchor]:
    """The run's anchors: those that it has, those of `anchors.path`, or new ones."""
    run, settings = session.run, session.config.anchors
    assert settings is not None
    if not run.exists(ANCHORS_FILE):
        if settings.path is not None:
            write_anchors(run, ANCHORS_FILE, list(read_anchors(settings.path).values()))
        else:
            sampler = Presampler(session.config, run, session.problem, session.restarts)
            sampler.write(session.train_prompts, session.model)
    return read_anchors(run.at(ANCHORS_FILE))


def refreshed_anchors(
    session: Session,
    crew: Crew,
    prompts: Sequence[TokenizedPrompt],
    before: Mapping[str, Anchor],
    step: int,
    name: str,
) -> dict[str, Anchor]:
    """The anchors of `prompts` under the current policy, by the training's own workers; written as `name`.

    Cached trajectories stay; so do prompts, since the order in which they come is a function of the step.
    """
    settings = session.config.anchors
    assert settings is not None
    sampling = replace(sampling_of(session.config), n=settings.num_rollouts)
    found: dict[str, Anchor] = {}
    for batch in anchor_batches(session.config, prompts, f"step {step}"):
        doing = f"the anchors after step {step}"
        rollouts = crew.generate(batch, sampling, step, doing)
        table = crew.score(rollouts, doing)
        crew.remember(rollouts, doing)
        for anchor in anchors_of(batch.shard.keys, table, sampling.n):
            old = before[anchor.prompt_key]
            found[anchor.prompt_key] = replace(anchor, trajectory=old.trajectory)
    write_anchors(session.run, name, list(found.values()))
    return found


def anchor_batches(config: RunConfig, prompts: Sequence[TokenizedPrompt], label: str) -> list[PromptBatch]:
    """The prompts in calls, with the seeds of reference rollouts; `label` tells one estimate from another."""
    seeds = [seed_of(config.run.seed, "anchors", label, p.prompt.key) for p in prompts]
    whole = make_prompt_batch(prompts, seeds)
    return whole.split(max(1, -(-len(prompts) // PROMPTS_PER_CALL)))


def write_anchors(run: RunDirectory, name: str, anchors: Sequence[Anchor]) -> None:
    """One Parquet file, written by Ray Data under another name and then moved to its own."""
    temporary = run.path(f".{name}.tmp")
    if exists(run.filesystem, temporary):
        run.filesystem.delete_dir(temporary)
    dataset = ray_data.from_arrow(anchors_to_arrow(anchors)).repartition(1)
    dataset.write_parquet(temporary, filesystem=run.filesystem)
    infos = run.filesystem.get_file_info(pafs.FileSelector(temporary, recursive=True))
    (file,) = (info.path for info in infos if info.type == pafs.FileType.File)
    run.filesystem.move(file, run.path(name))
    run.filesystem.delete_dir(temporary)


def worth_training(
    prompts: Sequence[TokenizedPrompt], anchors: Mapping[str, Anchor], config: RunConfig
) -> list[TokenizedPrompt]:
    """The prompts that PVPO's filter keeps, in order; raises `DataError` if it keeps none, or anchors are missing."""
    settings = config.anchors
    assert settings is not None
    missing = [p.prompt.key for p in prompts if p.prompt.key not in anchors]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(prompts)} prompts have no anchor (the first: {missing[0]}); presample again."
        )
    kept = []
    for prompt in prompts:
        anchor = anchors[prompt.prompt.key]
        verdict = fate(anchor.accuracy, settings.drop_solved, settings.drop_unsolved)
        if verdict == "keep" or (verdict == "ask" and anchor.trajectory is not None):
            kept.append(prompt)
    if not kept:
        raise DataError(
            f"The reference policy solves all or none of the rollouts of each of the {len(prompts)} prompts: none is "
            "left to train on; take another task difficulty, or set anchors.drop_solved or drop_unsolved to false."
        )
    return kept


def check_same_tokenizer(model: str, larger: str) -> None:
    """Raise `ConfigError` unless two models turn every text into the same tokens."""
    ours, theirs = (load_tokenizer(local_model(m)) for m in (model, larger))
    probe = "The sum of 17 and 25 is 42.\n<think>déjà vu</think> 你好 " * 2
    if ours.get_vocab() != theirs.get_vocab() or ours(probe).input_ids != theirs(probe).input_ids:
        raise ConfigError(
            f"anchors.larger_model: {larger} does not share its tokenizer with {model}, so its answers cannot join the "
            "training; take a larger model of the same family."
        )
