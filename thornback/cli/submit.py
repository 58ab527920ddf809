"""`thornback submit`: a Ray job that trains a recipe, with this directory as its working directory.

It is `ray job submit --working-dir . -- python -m thornback train RECIPE`, and reads the recipe first, so that a
mistake is found here and not on the cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
from pathlib import Path
from typing import Any

import thornback
from thornback.contracts import ActorLost, ConfigError
from thornback.train.config import load_recipe


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("submit", help="train a recipe as a job of a Ray cluster")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file inside the working directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the recipe's, as a.b=value")
    parser.add_argument("--address", required=True, help="the cluster's dashboard, such as http://HOST:8265")
    parser.add_argument("--working-dir", default=".", metavar="DIR", help="what the job gets to see (default: here)")
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    load_recipe(arguments.recipe, arguments.overrides)
    entrypoint = entrypoint_of(arguments.recipe, arguments.overrides, arguments.working_dir)
    client = connect(arguments.address)
    job = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_environment(Path(arguments.working_dir)))
    print(f"job {job}: {entrypoint}", flush=True)
    if not arguments.no_wait:
        follow(client, job, arguments.address)


def entrypoint_of(recipe: str, overrides: list[str], working_dir: str) -> str:
    """The job's command; the recipe by its path inside the working directory."""
    root, path = Path(working_dir).resolve(), Path(recipe).resolve()
    if not path.is_relative_to(root):
        raise ConfigError(f"The recipe {recipe} is outside the job's working directory {root}; move it inside.")
    return shlex.join(["python", "-m", "thornback", "train", path.relative_to(root).as_posix(), *overrides])


def runtime_environment(working_dir: Path) -> dict[str, Any]:
    """The working directory, less what .gitignore names; and thornback itself where the directory does not hold it."""
    environment: dict[str, Any] = {"working_dir": str(working_dir.resolve())}
    package = Path(thornback.__file__).parent
    if not (working_dir / package.name / "__init__.py").is_file():
        environment["py_modules"] = [str(package)]
    return environment


def connect(address: str) -> Any:
    """A job client; raises ConfigError where no cluster answers."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it reports every .gitignore that it packs by
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"The Ray cluster at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "~/.ray/auth_token to the cluster's."
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"No Ray cluster answers at {address} ({reason}); give its dashboard's address.") from error


def follow(client: Any, job: str, address: str) -> None:
    """Print the job's output until it ends; raises ActorLost where it failed."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        print(f"\nThe job goes on; `ray job stop {job} --address {address}` ends it.")
        raise
    status = client.get_job_status(job)
    if status != "SUCCEEDED":
        raise ActorLost(f"Job {job} ended as {status}; its log is above, and on the cluster's dashboard at {address}.")
