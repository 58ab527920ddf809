"""The house stands: imports point strictly down its floors, and nobody imports a room by its bare name."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    **{"contracts": 0, "algorithms": 0},
    **{"engine": 1, "data": 1},
    **{"actors": 2},
    **{"train": 3, "serve": 3},
}
KNOW_NO_RAY = ("contracts", "algorithms", "engine")
LIBRARIES_BARRED = {room: {"ray"} for room in KNOW_NO_RAY} | {"contracts": {"ray", "torch", "transformers"}}


def imports_of(path):
    """(line, module) of every import in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import; use the full name"
            yield node.lineno, node.module
            if node.module == "thornback":
                yield from ((node.lineno, f"thornback.{alias.name}") for alias in node.names)


def imports_of_room(room):
    for path in sorted((ROOT / room).rglob("*.py")):
        for line, module in imports_of(path):
            yield f"{path.relative_to(ROOT)}, line {line}: {module}", module


@pytest.mark.parametrize("room", FLOORS)
def test_imports_point_strictly_down(room):
    for where, module in imports_of_room(room):
        parts = module.split(".")
        if parts[0] != "thornback" or parts[1:2] == [room]:
            continue
        assert len(parts) > 1, f"{where}: a room must not know the front door"
        assert parts[1] in FLOORS, f"{where}: a room must not know the front door"
        assert FLOORS[parts[1]] < FLOORS[room], where


@pytest.mark.parametrize("room", FLOORS)
def test_contracts_and_mathematics_know_no_framework(room):
    for where, module in imports_of_room(room):
        assert module.split(".")[0] not in LIBRARIES_BARRED.get(room, set()), where


@pytest.mark.parametrize("folder", [*FLOORS, "tests", "benchmarks", "thornback/cli"])
def test_nobody_imports_a_room_by_its_bare_name(folder):
    for where, module in imports_of_room(folder):
        assert module.split(".")[0] not in FLOORS, where


def test_every_room_is_linked_under_the_front_door():
    for room in FLOORS:
        link = ROOT / "thornback" / room
        assert link.is_symlink()
        assert link.readlink() == Path("..") / room


@pytest.mark.parametrize("room", FLOORS)
def test_a_public_name_is_no_modules_name(room):
    """Where both have one name, what an import gives would hang on what was imported before."""
    tree = importlib.import_module(f"thornback.{room}")
    modules = {path.stem for path in (ROOT / room).glob("*.py")}
    shared = {name for name in tree.__all__ if name in modules}
    assert all(callable(getattr(tree, name)) for name in shared)
    assert shared <= {"generate"}, "its __init__ imports the function at once, which settles it"
