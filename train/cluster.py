"""The Ray cluster of a run: the one that is there, or one of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from thornback.contracts import ConfigError


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be connected to Ray: to the cluster that this process is connected to already, to the one at `address` or in
    RAY_ADDRESS (as in a submitted job), or to a new one on this machine, which ends with the context."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(
            address=address or (None if os.environ.get("RAY_ADDRESS") else "local"),
            log_to_driver=False,  # actors' logs are in files; the terminal shows the run
            logging_level=logging.ERROR,
            **({} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}),
        )
    except ConnectionError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        where = address or os.environ.get("RAY_ADDRESS")
        raise ConfigError(f"run.address: no Ray cluster answers at {where} ({reason}); start one.") from error
    _quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_ray_data() -> None:
    """Ray Data tells every step of every dataset; that stays in its log files."""
    from ray import data as ray_data

    ray_data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)  # that bars are off is a warning
