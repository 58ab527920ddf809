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
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for of, text in found if of == language]


def commands(page):
    return [line for block in blocks(page) for line in block.splitlines()]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(r"(?:\$ |\.venv(?:-bench)?/bin/|[A-Z_]+=\S+ )?(thornback [a-z-].*)")
THORNBACK = [match[1] for page in PAGES for c in commands(page) if (match := OURS.fullmatch(c))]
MAKE = sorted({c.split("#")[0].strip() for page in PAGES for c in commands(page) if c.startswith("make ")})
# Other commands that stand as they are, and where the like of them is run.
OTHERS = {
    "curl ": "serve/test_weights.py",
    "vllm bench serve ": "serve/test_openapi.py",
    "schemathesis run ": "serve/test_openapi.py",
    "serve deploy ": "thornback/test_deploy.py",
    "serve run ": "thornback/test_deploy.py",
    "ray job submit ": "thornback/test_submit.py",
    "pip install ": "thornback/test_wheel.py",
    "source ": "thornback/test_wheel.py",
}


def test_other_commands_are_run_somewhere_or_say_what_they_need():
    """Blocks marked `sh` hold what this machine cannot run; their section begins by saying so."""
    known = re.compile("|".join(map(re.escape, ("make ", *OTHERS))))
    tool = re.compile(r"(ray|kubectl|docker|pip|serve|vllm|curl|schemathesis|python|make|source) ")
    for page in PAGES:
        for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE):
            if "```sh\n" in section:
                assert "*These commands need" in section, f"{page.name}: {section[:40]}"
        for command in commands(page):
            if tool.match(command):
                assert known.match(command) or OURS.fullmatch(command), f"{page.name}: {command}"
    assert all((ROOT / "tests" / test).is_file() for test in OTHERS.values())


@pytest.mark.parametrize("command", THORNBACK)
def test_commands_of_the_docs_are_understood(command):
    arguments = shlex.split(command, comments=True)[1:]
    parsed = parse(arguments)
    if getattr(parsed, "recipe", "").startswith("recipes/"):
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
