"""Files at any pyarrow.fs location: a path, or a URI such as s3://bucket/run."""

from __future__ import annotations

import os
import shutil
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


def local_model(model: str) -> str:
    """A model as libraries take it: a directory of this machine, or a hub name. One at a URI is copied here, once."""
    if "://" not in model:
        return model
    if is_local(model):
        return resolve(model)[1]
    target = Path.home() / ".cache" / "thornback" / model.replace("://", "/").strip("/")
    if not target.is_dir():
        filesystem, path = resolve(model)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(path, str(temporary), source_filesystem=filesystem)
        try:
            temporary.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
            shutil.rmtree(temporary)
    return str(target)
