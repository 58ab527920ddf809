"""Jobs on a Ray cluster: what is sent, and that it runs."""

import pytest

from thornback.cli import submit
from thornback.contracts import ConfigError

ROOT = submit.Path(submit.thornback.__file__).parents[1]


def test_the_recipe_is_named_by_its_place_in_the_working_directory(tmp_path):
    recipe = tmp_path / "my recipes" / "a.yaml"
    command = submit.entrypoint_of(str(recipe), ["run.name=a b"], str(tmp_path))
    assert command == "python -m thornback train 'my recipes/a.yaml' 'run.name=a b'"
    with pytest.raises(ConfigError, match="outside the job's working directory"):
        submit.entrypoint_of(str(recipe), [], str(tmp_path / "elsewhere"))


def test_thornback_travels_with_a_directory_that_does_not_hold_it(tmp_path):
    assert submit.runtime_environment(tmp_path) == {
        "working_dir": str(tmp_path),
        "py_modules": [str(ROOT / "thornback")],
    }
    assert submit.runtime_environment(ROOT) == {"working_dir": str(ROOT)}
