"""A run's directory: line files, checkpoints and models, at any pyarrow.fs location."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from thornback.actors.locations import exists, is_local, join, resolve, write_atomically


class RunDirectory:
    """Paths and files of one run.

    `metrics`, `evaluation` and `events` are line files; the first two are cut back when a run resumes, the last
    only grows.
    """

    def __init__(self, location: str) -> None:
        self.filesystem, self.root = resolve(location)
        self.location = self.root if is_local(location) else location
        self.filesystem.create_dir(self.root, recursive=True)
        self.metrics = JsonLines(self.filesystem, f"{self.root}/metrics.jsonl")
        self.evaluation = JsonLines(self.filesystem, f"{self.root}/evaluation.jsonl")
        self.events = JsonLines(self.filesystem, f"{self.root}/events.jsonl")

    @property
    def is_local(self) -> bool:
        return is_local(self.location)

    def at(self, *parts: str) -> str:
        """A location below the run's, as actors and readers take it."""
        return join(self.location, *parts)

    def path(self, *parts: str) -> str:
        """The same as a path in `filesystem`."""
        return join(self.root, *parts)

    def exists(self, *parts: str) -> bool:
        return exists(self.filesystem, self.path(*parts))

    def remove(self, *parts: str) -> None:
        """Delete a file or a directory, if it is there."""
        kind = self.filesystem.get_file_info(self.path(*parts)).type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path(*parts))
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path(*parts))

    def make_empty(self, *parts: str) -> None:
        """An empty directory."""
        self.remove(*parts)
        self.filesystem.create_dir(self.path(*parts), recursive=True)

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.filesystem, self.path(name), text.encode())

    def read_text(self, name: str) -> str | None:
        """A file's text, or None if there is no such file."""
        if not self.exists(name):
            return None
        with self.filesystem.open_input_file(self.path(name)) as file:
            return file.read().decode()

    def write_table(self, name: str, table: pa.Table) -> None:
        """A Parquet file, whole or not at all."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_atomically(self.filesystem, self.path(name), sink.getvalue())

    def event(self, kind: str, message: str) -> None:
        """Note what happened to the run."""
        self.events.append({"time": time.time(), "kind": kind, "message": message})

    def rewind(self, step: int) -> None:
        """Forget what was measured after `step`."""
        self.metrics.keep(lambda row: row["step"] <= step)
        self.evaluation.keep(lambda row: row["step"] <= step)

    def flush(self) -> None:
        """Bring line files to where a filesystem cannot append."""
        for lines in (self.metrics, self.evaluation, self.events):
            lines.flush()


class JsonLines:
    """One JSON object a line. Appended at once on a local filesystem; elsewhere, where files cannot grow, the
    whole file is written at `flush`."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._appends = isinstance(filesystem, pafs.LocalFileSystem)
        self._pending: list[str] = []
        self._lock = threading.Lock()  # actors' losses are noted from whichever thread sees them

    def append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row) + "\n"
        with self._lock:
            if self._appends:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(line)
            else:
                self._pending.append(line)

    def read(self) -> list[dict[str, Any]]:
        """All rows. A last line that a kill cut short is no row."""
        rows = []
        for line in [*self._text().splitlines(keepends=True), *self._pending]:
            if line.endswith("\n"):
                rows.append(json.loads(line))
        return rows

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows that are not wanted."""
        rows = [row for row in self.read() if wanted(row)]
        self._pending = []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if text != self._text():
            write_atomically(self._filesystem, self._path, text.encode())

    def flush(self) -> None:
        with self._lock:
            if self._pending:
                text = self._text() + "".join(self._pending)
                write_atomically(self._filesystem, self._path, text.encode())
                self._pending = []

    def _text(self) -> str:
        if not exists(self._filesystem, self._path):
            return ""
        with self._filesystem.open_input_file(self._path) as file:
            return file.read().decode()
