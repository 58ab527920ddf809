"""What a recipe would run, without running it: `--dry-run`."""

from __future__ import annotations

from thornback.train.config import RunConfig


def describe(config: RunConfig) -> str:
    """The run in words, then its whole configuration as YAML (which is itself a recipe)."""
    facts = _facts(config)
    width = max(map(len, facts))
    lines = [f"  {label:<{width}}  {fact}" for label, fact in facts.items()]
    return "\n".join(
        ["This would run:", *lines, "", "Actors:", *_actors(config), "", "Configuration:", "", config.to_yaml()]
    )


def _facts(config: RunConfig) -> dict[str, str]:
    """By label, in the order in which a run comes to them."""
    prompts, samples = config.data.prompts_per_step, config.rollout.samples_per_prompt
    rewards = ", ".join(f"{name} (weight {r.weight:g})" for name, r in config.rewards.items())
    facts = {
        "run": f"{config.run.name}, into {config.directory}, seed {config.run.seed}",
        "cluster": config.run.address or "the one that RAY_ADDRESS names, or one of this run's own",
        "model": _model(config),
        "task": _task(config),
        "rewards": rewards or "all of the task's, alike",
        "training": f"{config.run.steps} steps of {prompts} prompts x {samples} samples = {prompts * samples} rollouts",
        "algorithm": f"{config.algorithm.estimator} advantages, {config.algorithm.loss} loss",
        "evaluation": _evaluation(config),
    }
    if config.warm_start is not None:
        facts["warm start"] = f"{config.warm_start.steps} steps of {config.warm_start.batch_size} demonstrations"
    if config.anchors is not None:
        facts["anchors"] = config.anchors.path or f"{config.anchors.num_rollouts} reference rollouts a prompt"
    return facts


def _model(config: RunConfig) -> str:
    build = config.model.build
    built = (
        f"built here: {build.architecture}, {build.num_hidden_layers} layers, {build.hidden_size} wide" if build else ""
    )
    lora = f", LoRA of rank {config.model.lora.rank}" if config.model.lora else ""
    return (config.model.path or built or "none") + lora


def _task(config: RunConfig) -> str:
    options = ", ".join(f"{key}={value}" for key, value in config.task.options.items())
    return config.task.name + (f" ({options})" if options else "")


def _evaluation(config: RunConfig) -> str:
    if config.evaluation.every == 0:
        return "none"
    how = "sampled and greedy" if config.evaluation.greedy else "sampled"
    return f"{config.evaluation.num_prompts} held-out prompts, {how}, every {config.evaluation.every} steps"


def _actors(config: RunConfig) -> list[str]:
    roles = [
        ("RolloutWorker", config.rollout.num_workers, config.rollout.num_cpus, config.rollout.num_gpus),
        ("RewardModel", config.scoring.num_workers, config.scoring.num_cpus, 0.0),
        ("Learner", config.learner.num_ranks, config.learner.num_cpus, config.learner.num_gpus),
        ("WeightStore", 1, 0.0, 0.0),
    ]
    if config.rollout.refreshes_draft:
        roles.append(("DraftLearner", 1, 0.0, config.rollout.rasd.draft_num_gpus))
    return [f"  {count} x {role:<13}  CPU {cpus:g}, GPU {gpus:g} each" for role, count, cpus, gpus in roles]
