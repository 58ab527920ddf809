"""A run's metrics as TensorBoard files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import pyarrow.fs as pafs

from thornback.train.run_directory import RunDirectory


class TensorBoard:
    """Writes each step's metrics below RUN/tensorboard. Away from the local disk, files arrive at `close`."""

    def __init__(self, run: RunDirectory, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._directory = run.path("tensorboard") if run.is_local else tempfile.mkdtemp(prefix="tensorboard-")
        # Points after `start_step`, which a killed run wrote before, are hidden.
        self._writer = SummaryWriter(self._directory, purge_step=start_step + 1)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """One step's row of metrics.jsonl."""
        for key, value in metrics.items():
            if key not in ("step", "time", "version"):
                self._writer.add_scalar(key, value, metrics["step"], walltime=metrics["time"])

    def close(self) -> None:
        self._writer.close()
        if not self._run.is_local:
            target = self._run.path("tensorboard")
            pafs.copy_files(self._directory, target, destination_filesystem=self._run.filesystem)
