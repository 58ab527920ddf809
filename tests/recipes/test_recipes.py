"""The recipes are valid."""

from pathlib import Path

import pytest

from thornback import cli

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_what_they_would_run(recipe, capsys):
    assert cli.main(["train", str(recipe), "--dry-run"]) == 0
    assert "This would run:" in capsys.readouterr().out
