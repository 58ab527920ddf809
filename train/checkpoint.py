"""Checkpoints: written under a temporary name, then renamed; read back only if whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from thornback.contracts import DataError
from thornback.train.run_directory import RunDirectory

MANIFEST = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run after `step` steps. `location` holds the actors' files, `state` is the rest."""

    step: int
    location: str
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run directory, of which the newest `keep` stay."""

    def __init__(self, run: RunDirectory, keep: int) -> None:
        self._run = run
        self._keep = keep

    def save(self, step: int, state: dict[str, Any], write: Callable[[str], None]) -> str:
        """Make the checkpoint of `step`: `write(location)` puts its files into a directory. Returns its location.

        The manifest, written last, names every file with its size: where a filesystem's move is a copy, a
        checkpoint that was cut short is known by it.
        """
        run, name = self._run, f".step-{step}.tmp"
        temporary = run.path("checkpoints", name)
        run.make_empty("checkpoints", name)
        write(run.at("checkpoints", name))
        manifest = {"step": step, "files": self._sizes(temporary), "state": state}
        with run.filesystem.open_output_stream(f"{temporary}/{MANIFEST}") as stream:
            stream.write(json.dumps(manifest, indent=1).encode())
        run.remove("checkpoints", f"step-{step}")  # an earlier life of this run may have come as far
        run.filesystem.move(temporary, run.path("checkpoints", f"step-{step}"))
        for old in self._steps()[: -self._keep]:
            run.remove("checkpoints", f"step-{old}")
        return run.at("checkpoints", f"step-{step}")

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint. Raises `DataError` if there are some, but none is whole."""
        steps = self._steps()
        for step in reversed(steps):
            checkpoint = self._read(step)
            if checkpoint is not None:
                return checkpoint
        if steps:
            where = self._run.at("checkpoints")
            raise DataError(f"None of the checkpoints in {where} is whole; remove the directory to start again.")
        return None

    def _read(self, step: int) -> Checkpoint | None:
        path = self._run.path("checkpoints", f"step-{step}")
        try:
            with self._run.filesystem.open_input_file(f"{path}/{MANIFEST}") as file:
                manifest = json.loads(file.read())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        sizes = self._sizes(path)
        if any(sizes.get(name) != size for name, size in manifest["files"].items()):
            return None
        return Checkpoint(manifest["step"], self._run.at("checkpoints", f"step-{step}"), manifest["state"])

    def _sizes(self, path: str) -> dict[str, int]:
        """Size in bytes of every file in a directory."""
        infos = self._run.filesystem.get_file_info(pafs.FileSelector(path))
        return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}

    def _steps(self) -> list[int]:
        selector = pafs.FileSelector(self._run.path("checkpoints"), allow_not_found=True)
        names = (info.base_name for info in self._run.filesystem.get_file_info(selector))
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))
