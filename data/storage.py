"""Rollouts and anchors as Parquet, at any pyarrow.fs location."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from thornback.contracts import Anchor, DataError, RolloutBatch, anchors_from_arrow, anchors_to_arrow
from thornback.data.files import open_location


def write_rollouts(batch: RolloutBatch, location: str) -> None:
    """One row a rollout. The file appears whole, or not at all."""
    write_table(batch.to_arrow(), location)


def read_rollouts(location: str) -> RolloutBatch:
    return RolloutBatch.from_arrow(read_table(location))


def write_anchors(anchors: Iterable[Anchor], location: str) -> None:
    write_table(anchors_to_arrow(list(anchors)), location)


def read_anchors(location: str) -> dict[str, Anchor]:
    """By prompt key."""
    return anchors_from_arrow(read_table(location))


def write_table(table: pa.Table, location: str) -> None:
    """Write to a temporary name, then rename."""
    filesystem, path = open_location(location)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    partial = f"{path}.partial"
    with filesystem.open_output_stream(partial) as sink:
        pq.write_table(table, sink)
    filesystem.move(partial, path)


def read_table(location: str) -> pa.Table:
    """A Parquet file, or a directory of them. Raises `DataError` where there is none."""
    filesystem, path = open_location(location)
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        raise DataError(f"{location} does not exist.")
    try:
        return pq.read_table(path, filesystem=filesystem)
    except pa.ArrowInvalid as error:
        raise DataError(f"{location} is no Parquet file: {str(error).splitlines()[0]}.") from error
