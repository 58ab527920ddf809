"""The wheel: real folders for the rooms, and everything that they need, wherever it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("contracts", "algorithms", "engine", "data", "actors", "train", "serve", "cli")
PIP = (sys.executable, "-m", "pip")


def sources(room):
    """The files of a room that a wheel must hold, as paths inside `thornback/`."""
    kept = (p for p in (ROOT / "thornback" / room).rglob("*") if p.suffix in (".py", ".jinja"))
    return {f"thornback/{p.relative_to(ROOT / 'thornback')}" for p in kept}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves build/ behind, and would pack what an older build left there.
    not_code = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, directory / "source", symlinks=True, ignore=not_code)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory))
    subprocess.run([*PIP, "wheel", *options, str(directory / "source")], check=True)
    return next(directory.glob("*.whl"))


@pytest.mark.full
def test_holds_every_room_as_real_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        links = [i.filename for i in archive.infolist() if i.external_attr >> 28 == 0o12]
    for room in ROOMS:
        assert sources(room) <= names
    assert links == []
    strangers = {n.split("/")[0] for n in names} - {"thornback", f"thornback-{wheel.name.split('-')[1]}.dist-info"}
    assert strangers == set(), "nothing of ours lies at the top level of site-packages"


@pytest.mark.full
def test_works_where_it_is_installed(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def output(*command):
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    imports = "; ".join(f"import thornback.{room}" for room in ROOMS)
    assert output(sys.executable, "-c", f"{imports}; print(thornback.__file__)").strip() == str(
        target / "thornback" / "__init__.py"
    )
    assert output(sys.executable, str(target / "bin" / "thornback"), "--version").startswith("thornback ")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    output(sys.executable, "-m", "thornback", "report", "run")
    assert "No step has been finished yet" in (tmp_path / "run" / "report.html").read_text()
