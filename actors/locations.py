"""Files at any pyarrow.fs location: a path, or a URI such as s3://bucket/run."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.fs as pafs

from thornback.data import open_location


def resolve(location: str | Path) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a location and the path in it; raises `DataError` for a URI that pyarrow cannot read."""
    return open_location(os.fspath(location))


def is_local(location: str | Path) -> bool:
    """Whether plain file operations reach the location."""
    text = os.fspath(location)
    return "://" not in text or text.startswith("file://")


def join(location: str, *parts: str) -> str:
    """A location below another."""
    return "/".join([location.rstrip("/"), *parts])


def write_atomically(filesystem: pafs.FileSystem, path: str, data: bytes) -> None:
    """Replace a file's content: it is the old or the new one at any moment, wherever moves replace."""
    temporary = f"{path}.tmp"
    with filesystem.open_output_stream(temporary) as stream:
        stream.write(data)
    filesystem.move(temporary, path)


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def local_copy(location: str, cache: str) -> str:
    """A directory's path on this machine: itself if it is local, else a copy below `cache`, made once."""
    if is_local(location):
        return resolve(location)[1]
    target = os.path.join(cache, location.replace("://", "/").strip("/"))
    if not os.path.isdir(target):
        filesystem, path = resolve(location)
        temporary = f"{target}.{os.getpid()}.tmp"
        os.makedirs(temporary, exist_ok=True)
        pafs.copy_files(path, temporary, source_filesystem=filesystem)
        try:
            os.rename(temporary, target)
        except OSError:  # another process was faster
            if not os.path.isdir(target):
                raise
    return target
