"""A run's configuration: a YAML recipe, then `key=value` overrides, checked before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from thornback.contracts import ENGINE_SIZES, ConfigError
from thornback.train.sections import (
    AlgorithmSection,
    AnchorsConstants,
    CheckpointSection,
    DataSection,
    EnvironmentConstants,
    EvaluationSection,
    LearnerSection,
    ModelSection,
    RewardSection,
    RolloutSection,
    RunSection,
    ScoringSection,
    Section,
    TaskSection,
    WarmStartSection,
)

ANCHORED_ESTIMATORS = ("pvpo", "anchored_dvao")


class RunConfig(Section):
    """Everything that a run is made of. `thornback train RECIPE` reads one; `Trainer` takes one."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    data: DataSection = DataSection()
    rewards: dict[str, RewardSection] = Field(default_factory=dict)
    """The rewards by name. Empty: all of the task's, with equal weights."""
    rollout: RolloutSection = RolloutSection()
    environment: EnvironmentConstants = EnvironmentConstants()
    scoring: ScoringSection = ScoringSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    learner: LearnerSection = LearnerSection()
    anchors: AnchorsConstants | None = None
    """Reference anchors and the filter that goes with them. None: no pre-sampling."""
    warm_start: WarmStartSection | None = None
    """None: reinforcement learning starts from the model as it is."""
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    serve: dict[str, Any] = Field(default_factory=dict)
    """Settings of `thornback serve` for this run's model: fields of thornback.serve.ServeConfig."""

    @property
    def directory(self) -> str:
        """Where the run's files live."""
        return self.run.dir or f"runs/{self.run.name}"

    @model_validator(mode="after")
    def _check_combinations(self) -> RunConfig:
        if self.model.path is not None and self.model.build is not None:
            raise ValueError("model: give either model.path or model.build, not both")
        truncated = self.rollout.top_p < 1.0 or self.rollout.top_k > 0 or self.rollout.min_p > 0.0
        if truncated and not self.rollout.allow_truncation:
            raise ValueError(
                "rollout: top_p, top_k and min_p draw from another distribution than the one that is trained; "
                "leave them out, or set rollout.allow_truncation=true"
            )
        if self.algorithm.estimator in ANCHORED_ESTIMATORS and self.anchors is None:
            raise ValueError(
                f"algorithm.estimator: {self.algorithm.estimator} needs reference anchors; add an `anchors:` section"
            )
        if self.rollout.speculate != "off" and self.rollout.engine not in ("torch", "vllm", "auto"):
            raise ValueError(
                f"rollout.speculate: the engine {self.rollout.engine} does not speculate; take rollout.engine=torch, "
                "or set rollout.speculate=off"
            )
        if self.rollout.speculate != "off" and self.rollout.rasd.draft and self.rollout.engine == "vllm":
            raise ValueError(
                "rollout.rasd.draft: vLLM shows a draft head no hidden states; take rollout.engine=torch, or leave the "
                "draft out"
            )
        if self.rollout.speculate != "off" and self.rollout.max_staleness:
            raise ValueError(
                "rollout.max_staleness: rollouts that run ahead are not guessed; take rollout.max_staleness=0, or set "
                "rollout.speculate=off"
            )
        if self.rollout.engine == "torch":
            for name in self.rollout.engine_options:
                if name not in ENGINE_SIZES:
                    nearest = difflib.get_close_matches(name, ENGINE_SIZES, n=1, cutoff=0.0)[0]
                    raise ValueError(f'rollout.engine_options: unknown key "{name}"; did you mean "{nearest}"?')
        if self.rewards and not any(r.weight > 0 for r in self.rewards.values()):
            raise ValueError("rewards: every weight is 0; give at least one reward a weight")
        return self

    def to_yaml(self) -> str:
        """The whole configuration, defaults included: loading it gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides such as `learner.learning_rate=1e-4`.

    Raises `ConfigError`, one sentence that names the key and the file, for a file that is missing or no YAML,
    an unknown key (with the nearest known one), or a value out of its bounds.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"The recipe {path} cannot be read ({reason}); give the path of a YAML file.") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{path}{where}: this is no YAML ({reason}); correct the recipe.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, but this file holds a {type(values).__name__}.")
    return make_config(values, overrides, source=str(path))


def make_config(values: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "the settings") -> RunConfig:
    """A checked configuration from nested values and overrides; `source` is what errors call the values' origin."""
    merged = _copy(values)
    overridden = set()
    for override in overrides:
        overridden.add(apply_override(merged, override))
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_sentence(error, source, overridden)) from None


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def apply_override(values: dict[str, Any], override: str) -> str:
    """Set one `a.b=value` in place; returns its dotted key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f'The override "{override}" is not of the form key=value, such as learner.num_ranks=2.')
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f'The value of the override "{override}" is no YAML; put it in quotes.') from None
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ConfigError(f'The override "{override}" goes through "{parent}", which is a value and no section.')
    place[last] = value
    return key


def _sentence(error: ValidationError, source: str, overridden: set[str]) -> str:
    """The first problem of a validation error as one sentence."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if any(key == o or key.startswith(f"{o}.") or o.startswith(f"{key}.") for o in overridden):
        source = "the command line"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.3)
        prefix = ".".join([*location[:-1], ""]) if location[:-1] else ""
        hint = f'did you mean "{prefix}{nearest[0]}"?' if nearest else f"known here: {', '.join(known)}."
        return f'{source}: unknown key "{key}"; {hint}'
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not key:
        return f"{source}: {message}" + ("" if message.endswith("?") else ".")
    return f'{source}: "{key}" is {problem["input"]!r}, but {_wanted(problem["type"], message)}.'


def _wanted(kind: str, message: str) -> str:
    """pydantic's "Input should be greater than 0" as the end of our sentence."""
    if kind == "model_type":
        return "it should be a section with keys of its own"
    return message.replace("Input should", "it should").partition(", unable")[0].rstrip(".")


def _known_keys(location: list[str]) -> list[str]:
    """The field names of the section at a location."""
    annotation: Any = RunConfig
    for part in location:
        is_mapping = get_origin(annotation) is dict  # of sections by free names
        annotation = get_args(annotation)[1] if is_mapping else _section_in(annotation).model_fields[part].annotation
    return list(_section_in(annotation).model_fields)


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section class of an annotation `Section` or `Section | None`."""
    return next(a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel))
