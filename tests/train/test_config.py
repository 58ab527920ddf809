"""A recipe is checked before anything starts, and an error is one sentence that names the key and the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thornback.contracts import ConfigError
from thornback.train.config import RunConfig, load_recipe, make_config


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_recipe_then_overrides(tmp_path):
    recipe = write(tmp_path, "run: {steps: 5}\nlearner: {learning_rate: 1e-4}\n")
    config = load_recipe(recipe, ["run.steps=7", "rewards.correct.weight=0.25", "anchors.num_rollouts=3"])
    assert (config.run.steps, config.learner.learning_rate) == (7, 1e-4)
    assert config.rewards["correct"].weight == 0.25
    assert config.anchors is not None
    assert config.anchors.num_rollouts == 3


def test_configuration_survives_its_own_file(tmp_path):
    config = make_config({"anchors": {}, "rewards": {"a": {"range": [-1, 1]}}, "model": {"build": {}}})
    assert load_recipe(write(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("learner.learing_rate=1", ['unknown key "learner.learing_rate"', '"learner.learning_rate"', "command line"]),
        ("rewards.correct.wieght=1", ['"rewards.correct.weight"']),
        ("model.build.hiddn=3", ['"model.build.hidden_size"']),
        ("rollout.engine_options.blocksize=3", ['"block_size"']),
        ("lerner.x=3", ['"learner"']),
        ("learner.num_ranks=0", ['"learner.num_ranks" is 0', "greater than 0"]),
        ("algorithm.estimator=ppo", ["algorithm.estimator", "dvao"]),
        ("algorithm.estimator=pvpo", ["needs reference anchors"]),
        ("rollout.top_p=0.9", ["allow_truncation"]),
        ("rollout.speculate=rast", ["rollout.speculate", "'rasd'"]),
        ("rollout.rasd.num_nodes=64", ['"rollout.rasd.num_nodes" is 64', "less than or equal to 63"]),
        ("rollout={speculate: rasd, engine: my.package:engine}", ["my.package:engine does not speculate"]),
        ("rollout={speculate: rasd, engine: vllm, rasd: {draft: head}}", ["rollout.rasd.draft", "no hidden states"]),
        ("learner.max_grad_norm=.nan", ["finite"]),
        ("learner=3", ['"learner" is 3', "section"]),
        ("learner", ["key=value"]),
        ("run.steps.x=1", ["steps", "section"]),
    ],
)
def test_wrong_override_is_one_sentence(tmp_path, override, parts):
    recipe = write(tmp_path, "run: {steps: 5}\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe, [override])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("learner: {num_rank: 2}", '"learner.num_ranks"'),
        ("- a\n- b\n", "mapping"),
        ("run: {steps: [}", "line 1"),
        ("rewards: {a: {weight: 0}}", "every weight is 0"),
    ],
)
def test_wrong_recipe_names_the_file(tmp_path, text, part):
    recipe = write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as error:
        load_recipe(recipe)
    assert part in str(error.value)


def test_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_common_fields_are_under_a_hundred():
    from thornback.train import sections

    method_sections = {
        name for name in vars(sections) if name.endswith("Constants") or name in ("BuildSection", "WarmStartSection")
    }
    common = [
        field
        for name, section in vars(sections).items()
        if isinstance(section, type) and issubclass(section, sections.Section) and name not in method_sections
        for field in section.model_fields
    ]
    assert 60 < len(common) + len(RunConfig.model_fields) < 100


def test_every_setting_is_described():
    from thornback.train import sections

    for name, section in vars(sections).items():
        if isinstance(section, type) and issubclass(section, sections.Section):
            assert section.__doc__, name
            for field, info in section.model_fields.items():
                assert info.description, f"{name}.{field}"


def test_checking_a_recipe_loads_neither_torch_nor_ray():
    code = (
        "import sys, thornback.train.config; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
