"""What supervising an actor needs: its options, its name in messages, what counts as lost, and the restart budget."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from thornback.contracts import ActorLost, ThornbackError

# The process or its node is gone: the same work elsewhere gives the same result.
LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


class DataLost(ActorLost):
    """What an actor had made is gone with its node or owner: go back to where it can be made again."""


class LearnerLost(DataLost):
    """A learner rank died or hung, and the group's state with it."""


def actor_options(num_cpus: float = 0.0, num_gpus: float = 0.0) -> dict[str, Any]:
    """Options of every actor of ours. Ray never restarts them: supervision does, and says so."""
    from thornback.engine import ACTOR_ENVIRONMENT  # with torch, which not every actor needs

    return {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": {**ACTOR_ENVIRONMENT, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}},
    }


@dataclass(frozen=True, slots=True)
class Home:
    """Where an actor lives; every actor's `setup` returns one."""

    node: str
    pid: int

    @classmethod
    def here(cls) -> Home:
        return cls(socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"process {self.pid} on node {self.node}"


def use_threads(num_threads: int | None, share: int = 1) -> int:
    """Set torch's threads in this process: the number given, or this process's share of the node's cores."""
    import torch

    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // share)
    torch.set_num_threads(threads)
    return threads


class Restarts:
    """How many lost actors a run may still replace. Every loss is reported to `on_event(kind, message)`."""

    def __init__(self, limit: int, on_event: Callable[[str, str], None]) -> None:
        self.limit = limit
        self.used = 0
        self.on_event = on_event

    def spend(self, message: str) -> None:
        """Report a loss; raises `ActorLost` when the budget is spent."""
        self.used += 1
        self.on_event("actor_lost", message)
        if self.used > self.limit:
            raise ActorLost(
                f"{message}, and this run has replaced {self.limit} lost actors already (run.max_restarts); "
                "look for the cause in Ray's logs, then start the same command again to go on."
            )


def is_lost(error: BaseException) -> bool:
    """Whether an error means that a process is gone, the one that was called or one that it called.

    A constructor that raised is no loss: another attempt would raise again.
    """
    cause = _cause(error)
    return isinstance(cause, LOST) and not getattr(cause, "actor_init_failed", False)


def original_error(error: BaseException) -> BaseException:
    """What to raise for an error that is no loss of a process: our own errors as they were raised, `DataLost` for
    missing objects; a bug keeps its remote traceback."""
    cause = _cause(error)
    if isinstance(cause, ObjectLostError):
        return DataLost(
            f"Rollouts or weights are gone with the node or the actor that held them ({_first_line(cause)})"
        )
    return cause if isinstance(cause, ThornbackError) else error


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def kill(actor: Any) -> None:
    """End an actor's process now; it may be dead already."""
    ray.kill(actor, no_restart=True)
