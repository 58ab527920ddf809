"""Which files a location means, and their rows, one by one: local paths, URIs of pyarrow.fs, and hub names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from thornback.contracts import DataError

_FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
T = TypeVar("T")


class BadRow(str):
    """Why a row cannot be read."""


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path in it. Raises `DataError` for a scheme that nobody knows."""
    try:
        if "://" in location:
            return fs.FileSystem.from_uri(location)
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{location} cannot be opened: {str(error).splitlines()[0]}.") from error


def data_files(location: str, split: str | None = None) -> list[str] | None:
    """The data files of a location, sorted; None where it is no path but may be a hub name.

    A directory may be a hub-style folder (`data/train-00000-of-00001.parquet`; files that name the split are
    preferred), a saved dataset (`save_to_disk`), or several of these by split.
    """
    filesystem, path = open_location(location)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        if "://" not in location and _HUB_NAME.fullmatch(location):
            return None
        raise DataError(f"{location} does not exist; give a file, a directory, or the name of a hub dataset.")
    if info.type == fs.FileType.File:
        return [location]
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    files = sorted(f.path for f in found if f.type == fs.FileType.File and PurePosixPath(f.path).suffix in _FORMATS)
    files = [f for f in files if not _is_metadata(PurePosixPath(f).relative_to(path))]
    named = [f for f in files if split and _names_split(PurePosixPath(f).relative_to(path), split)]
    if not files:
        raise DataError(f"{location} holds no data files ({', '.join(_FORMATS)}).")
    prefix = location.partition("://")[0] + "://" if "://" in location else ""
    return [prefix + f for f in named or files]


def _is_metadata(relative: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part.startswith("cache-") for part in relative.parts)
    return hidden or relative.name in ("dataset_info.json", "state.json", "dataset_dict.json")


def _names_split(relative: PurePosixPath, split: str) -> bool:
    return any(re.match(rf"{re.escape(split)}(?:[-_.]|$)", part) for part in relative.parts)


def read_rows(file: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """`(row number, row)` of one file; numbers are lines of JSON files, or places in one that is a JSON list, and count
    from 1. A row that cannot be parsed comes as a `BadRow`. Raises `DataError` where the file as a whole is unreadable.
    """
    kind = _FORMATS.get(PurePosixPath(file).suffix)
    if kind is None:
        raise DataError(f"{file} has no known format; its name should end in {', '.join(_FORMATS)}.")
    filesystem, path = open_location(file)
    try:
        if kind == "json":
            listed = path.endswith(".json") and _is_list(filesystem, path)
            yield from (_listed_rows if listed else _json_rows)(filesystem, path)
        else:
            number = 0
            for batch in _batches(filesystem, path, kind):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} cannot be read as {kind}: {str(error).splitlines()[0]}.") from error


def read_checked(
    locations: Sequence[str],
    split: str | None,
    parse: Callable[[dict[str, Any]], T | BadRow | None],
    what: str,
    max_bad_rows: int,
) -> list[T]:
    """What `parse` makes of the rows of all locations, None left out. Raises `DataError`, with file and row, for more
    rows than `max_bad_rows` that are no `what`, and where there is nothing at all."""
    found: list[T] = []
    bad: list[str] = []
    for location in locations:
        files = data_files(location, split)
        if files is None:
            raise DataError(f"{location} does not exist; give the path of a file or directory with {what}.")
        for file in files:
            for number, row in read_rows(file):
                parsed = row if isinstance(row, BadRow) else parse(row)
                if isinstance(parsed, BadRow):
                    bad.append(f"{file}:{number}: {parsed}")
                elif parsed is not None:
                    found.append(parsed)
    where = ", ".join(locations)
    if len(bad) > max_bad_rows:
        raise DataError(
            f"{where} has {len(bad)} bad rows of {len(bad) + len(found)} ({'; '.join(bad[:3])}); mend them, or allow "
            "some with max_bad_rows."
        )
    if not found:
        raise DataError(f"{where} holds no {what}.")
    return found


def _is_list(filesystem: fs.FileSystem, path: str) -> bool:
    with filesystem.open_input_stream(path) as stream:
        return stream.read(256).lstrip()[:1] == b"["


def _listed_rows(filesystem: fs.FileSystem, path: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """A whole file as one list, as HotpotQA publishes its own."""
    with filesystem.open_input_stream(path) as stream:
        rows = json.loads(stream.read())
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else BadRow(f"a {type(row).__name__}, not an object")


def _json_rows(filesystem: fs.FileSystem, path: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    with filesystem.open_input_stream(path) as raw:
        text = pa.PythonFile(raw) if not hasattr(raw, "readline") else raw
        for number, line in enumerate(_lines(text), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield number, BadRow(f"no JSON ({error.msg})")
                continue
            yield number, row if isinstance(row, dict) else BadRow(f"a {type(row).__name__}, not an object")


def _lines(stream: Any) -> Iterator[str]:
    rest = b""
    while chunk := stream.read(1 << 20):
        *lines, rest = (rest + bytes(chunk)).split(b"\n")
        yield from (line.decode("utf-8") for line in lines)
    yield rest.decode("utf-8")


def _batches(filesystem: fs.FileSystem, path: str, kind: str) -> Iterator[pa.RecordBatch]:
    if kind == "parquet":
        with filesystem.open_input_file(path) as source:
            yield from pq.ParquetFile(source).iter_batches(batch_size=1024)
        return
    with filesystem.open_input_file(path) as source:
        try:
            yield from pa.ipc.open_stream(source)  # what `save_to_disk` writes
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
