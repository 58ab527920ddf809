"""The command line's frame: help, versions, exit codes."""

import pytest

import thornback
from thornback import cli
from thornback.cli import demo
from thornback.contracts import ConfigError


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

    monkeypatch.setattr(demo, "run", fail)
    assert cli.main(["demo"]) == code
    captured = capsys.readouterr()
    assert captured.err == said
    assert captured.out == ""
