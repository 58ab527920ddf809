"""A run's metrics as TensorBoard files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import pyarrow.fs as pafs

from thornback.train.run_directory import RunDirectory


class TensorBoard:
    """Writes each step's metrics below RUN/tensorboard. Away from the local disk, files arrive at `close`.

    `start_step`: what a killed run wrote after it is hidden.
    """

    def __init__(self, run: RunDirectory, start_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # torch's own writer would load torch
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._run = run
        self._directory = run.path("tensorboard") if run.is_local else tempfile.mkdtemp(prefix="tensorboard-")
        self._writer = EventFileWriter(self._directory)
        if start_step:
            hidden = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=start_step + 1, session_log=hidden))

    def update(self, metrics: Mapping[str, Any]) -> None:
        """One step's row of metrics.jsonl."""
        values = [
            self._summary.Value(tag=key, simple_value=value)
            for key, value in metrics.items()
            if key not in ("step", "time", "version")
        ]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=metrics["time"], step=metrics["step"], summary=summary))

    def close(self) -> None:
        self._writer.close()
        if not self._run.is_local:
            target = self._run.path("tensorboard")
            pafs.copy_files(self._directory, target, destination_filesystem=self._run.filesystem)
