"""The command line's frame: help, versions, exit codes, dry runs, and what it costs to be told of a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import thornback
from thornback import cli, serve
from thornback.contracts import ConfigError
from thornback.train.config import load_recipe

RECIPE = """
model: {build: {}}
anchors: {}
algorithm: {estimator: anchored_dvao}
rewards: {correct: {weight: 2}, brevity: {}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_prints_its_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"thornback {thornback.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("the recipe is wrong."), 2, "thornback: the recipe is wrong.\n"),
        (KeyboardInterrupt(), 130, "thornback: interrupted.\n"),
    ],
)
def test_what_went_wrong_becomes_one_sentence_and_an_exit_code(monkeypatch, capsys, error, code, said):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli.demo, "run", fail)
    assert cli.main(["demo"]) == code
    captured = capsys.readouterr()
    assert captured.err == said
    assert captured.out == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(cli.demo, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.parametrize("command", ["train", "presample", "eval"])
def test_a_dry_run_says_what_would_run_and_ends_with_a_recipe_of_it(command, recipe, capsys, tmp_path):
    assert cli.main([command, str(recipe), "run.steps=7", "learner.num_ranks=3", "--dry-run"]) == 0
    said, configuration = capsys.readouterr().out.split("Configuration:\n")
    for words in (
        *("arithmetic", "7 steps of 16 prompts x 8 samples = 128 rollouts", "anchored_dvao", "built here: qwen3"),
        *("correct (weight 2), brevity (weight 1)", "8 reference rollouts a prompt"),
        *("1 x RolloutWorker  CPU 0, GPU 0 each", "3 x Learner"),
    ):
        assert words in said
    (tmp_path / "again.yaml").write_text(configuration)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(recipe, ["run.steps=7", "learner.num_ranks=3"])
    assert yaml.safe_load(configuration)["run"]["steps"] == 7


def test_a_dry_run_names_the_learner_of_a_draft_head(recipe, capsys):
    guessed = [str(recipe), "rollout.speculate=rasd", "rollout.rasd.draft=head", "--dry-run"]
    for more, expected in (((), True), (("rollout.rasd.draft_refresh_every=null",), False)):
        assert cli.main(["train", *guessed, *more]) == 0
        assert ("1 x DraftLearner" in capsys.readouterr().out) == expected


def test_a_reader_that_leaves_early_is_no_error(recipe):
    command = [sys.executable, "-m", "thornback", "train", str(recipe), "--dry-run"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_end)
    assert done.stderr == ""
    assert done.returncode == 141


def test_reading_a_recipe_costs_none_of_the_heavy_imports(run_in_new_python):
    loaded = run_in_new_python(
        "import sys, thornback.cli, thornback.train.config\nprint(*{'ray', 'torch', 'transformers'} & set(sys.modules))"
    )
    assert loaded.split() == []


def test_public_names_are_imported_when_they_are_used(run_in_new_python):
    code = """if True:
        import sys, thornback
        before = len(sys.modules)
        thornback.SamplingParams(n=2)
        print(before < len(sys.modules), "torch" in sys.modules)
    """
    assert run_in_new_python(code).split() == ["True", "False"]


def test_every_public_name_exists():
    for name in thornback.__all__:
        assert getattr(thornback, name) is not None
    assert set(thornback.__all__) <= set(dir(thornback))
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = thornback.Trainr


@pytest.fixture
def run_in_new_python():
    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
        ).stdout

    return run


def test_serving_takes_settings_as_recipes_do(monkeypatch):
    seen = {}
    monkeypatch.setattr(serve, "run", lambda model, **settings: seen.update(settings, model=model), raising=False)
    arguments = ["serve", "runs/a", "--port", "0", "num_replicas=2", "limits.max_queued=64", "api_keys=[k]"]
    assert cli.main(arguments) == 0
    wanted = {"num_replicas": 2, "limits": {"max_queued": 64}, "api_keys": ["k"], "port": 0, "model": "runs/a"}
    assert seen == wanted


@pytest.mark.parametrize("arguments", [["train", "r.yaml", "--dryrun"], ["demo", "extra"], ["report", "run", "a=b"]])
def test_arguments_that_nobody_knows_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


def test_settings_may_stand_after_options(recipe, capsys):
    assert cli.main(["train", str(recipe), "run.steps=7", "--dry-run", "learner.num_ranks=3"]) == 0
    assert "3 x Learner" in capsys.readouterr().out
