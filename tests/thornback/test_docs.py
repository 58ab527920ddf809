"""The documentation says what the code does."""

import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from docs import make_configuration as reference
from thornback.cli.main import parse
from thornback.train.config import load_recipe

ROOT = Path(__file__).parents[2]


def test_the_configuration_reference_is_current():
    assert reference.PAGE.read_text() == reference.page(), "run `make docs`"


def test_every_setting_is_explained():
    for line in reference.page().splitlines():
        if line.startswith("| `"):
            assert line.split(" | ")[-1].strip(" |"), f"no meaning: {line}"


def blocks(page, language=""):
    """The fenced blocks of a Markdown page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page):
    return [line for block in blocks(page) for line in block.splitlines()]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "configuration.md"]
THORNBACK = [c for page in PAGES for c in commands(page) if re.search(r"\bthornback (?!\.)", c)]
MAKE = sorted({c.split("#")[0].strip() for page in PAGES for c in commands(page) if c.startswith("make ")})


@pytest.mark.parametrize("command", THORNBACK)
def test_commands_of_the_docs_are_understood(command):
    arguments = shlex.split(command[command.index("thornback ") :])[1:]
    parsed = parse(arguments)
    if hasattr(parsed, "recipe"):
        load_recipe(ROOT / parsed.recipe, parsed.overrides)


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_of_the_docs_exist(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_examples_of_the_readme_use_names_that_exist():
    for block in blocks(ROOT / "README.md", "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
