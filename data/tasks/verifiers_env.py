"""What is asked of an environment of the `verifiers` library before its episodes run.

Imported only where the library is installed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import verifiers.v1 as vf
from pydantic import ValidationError
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.harnesses.utils.mcp import connect_mcp
from verifiers.v1.interception import InterceptionServerConfig
from verifiers.v1.mcp import serve_shared

from thornback.contracts import ConfigError, Prompt
from thornback.data.tasks.verifiers_episode import plain
from thornback.data.tasks.verifiers_harness import HARNESS, opening

_PLAYED = ("null", HARNESS)


def playable(section: Mapping[str, Any], select: Mapping[str, Any]) -> tuple[vf.EnvConfig, vf.SelectConfig]:
    """The library's configuration of an environment whose one role is played here, by the policy, and of which of its
    tasks. Raises `ConfigError` for what cannot be made, or not be played."""
    try:
        config, selection = vf.resolve_env_config(dict(section)), vf.SelectConfig.model_validate(dict(select))
        taskset = vf.load_taskset(config.taskset)
    except Exception as error:  # an environment is somebody's own code
        raise ConfigError(f"The environment {_name(section)} cannot be made: {_sentence(error)}.") from error
    refuse = _refusal(config, taskset) or ("" if taskset.select(selection).bounded else "has no end; give select.limit")
    if refuse:
        raise ConfigError(f"The environment {config.env_id} {refuse}.")
    ((role, agent),) = agent_config_fields(config).items()
    harness = (agent.harness or vf.HarnessConfig()).model_copy(update={"id": HARNESS})
    ours: dict[str, Any] = {"harness": harness, "runtime": vf.SubprocessConfig(), "retries": vf.RetryConfig()}
    ours |= {"model": None, "client": None}
    # One server, since it is where the policy takes the place of a client.
    played = {role: agent.model_copy(update=ours), "interception": InterceptionServerConfig()}
    return config.model_copy(update=played), selection


def _refusal(config: vf.EnvConfig, taskset: vf.Taskset) -> str | None:
    """Why its episodes cannot be played, if so."""
    agents = agent_config_fields(config)
    if len(agents) != 1:
        return f"has the roles {', '.join(agents)}, but thornback trains environments of one role"
    (agent,) = agents.values()
    harness = (agent.harness or vf.default_agent_harness(config.taskset.id)).id
    if harness not in _PLAYED and (agent.harness is not None or harness != vf.default_agent_harness("").id):
        return f"brings the harness {harness}, but thornback plays those whose model only answers and calls tools"
    task = type(taskset).task_type()
    tools = [*taskset.toolsets(taskset.config), *task.toolsets(taskset.config.task)]
    runtimes = [tool.config.runtime for tool in tools if not tool.config.url]
    runtimes += [agent.runtime] if "runtime" in agent.model_fields_set else []
    if task.NEEDS_CONTAINER or not all(isinstance(runtime, vf.SubprocessConfig) for runtime in runtimes):
        return "needs a container, but thornback plays on the worker's own machine"
    if agent.max_input_tokens or agent.max_output_tokens or agent.max_total_tokens:
        return "bounds tokens by itself; leave that out, and set rollout.max_tokens"
    return None


def tasks_of(config: vf.EnvConfig, select: vf.SelectConfig) -> Iterable[vf.Task]:
    return vf.load_taskset(config.taskset).select(select)


def prompt_of(task: vf.Task, tools: tuple[dict[str, Any], ...]) -> Prompt:
    """Raises `ConfigError` for a task that cannot be played."""
    data, number = task.data, task.data.idx
    if data.prompt is None:
        raise ConfigError(f"Task {number} of the environment has no prompt: its other side speaks first.")
    if data.image is not None or data.network_block or "*" not in data.network_allow:
        raise ConfigError(f"Task {number} of the environment needs a container; thornback plays without.")
    try:
        messages = tuple(plain(message) for message in opening(data))
    except ValueError as error:
        raise ConfigError(f"Task {number} of the environment cannot be shown to a model: {error}") from None
    answer = getattr(data, "answer", None)
    return Prompt(task.key, messages, answer if isinstance(answer, str) else None, tools=tools)


def offered_tools(config: vf.EnvConfig, task: vf.Task) -> tuple[dict[str, Any], ...]:
    """The tools of an episode of `task`, in OpenAI's format: what the library's own servers say, started for that."""
    taskset = vf.load_taskset(config.taskset)
    toolsets = [*taskset.toolsets(config.taskset), *task.toolsets(task.config)]

    async def ask() -> tuple[dict[str, Any], ...]:
        async with serve_shared(toolsets) as servers, AsyncExitStack() as stack:
            specs = {name: {"url": server.url} for name, server in servers.items()}
            tools, _, _ = await connect_mcp({"mcpServers": specs}, stack)
        return tuple(tools)

    if not toolsets:
        return ()
    try:
        with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop, as in a notebook
            return thread.submit(asyncio.run, ask()).result()
    except Exception as error:
        raise ConfigError(f"The tools of {config.env_id} do not start: {_sentence(error)}.") from error


def judgements(task: vf.Task) -> Iterator[str]:
    """The names of a task's rewards and metrics, as far as they are known before an episode."""
    yield from (hook.__name__ for kind in ("reward", "metric") for hook in task.hooks(kind))
    yield from (judge.reward_name for judge in task.plugged_judges())


def _name(section: Mapping[str, Any]) -> str:
    taskset = section.get("taskset")
    return str((taskset.get("id") if isinstance(taskset, Mapping) else None) or section.get("id") or "without a name")


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return f"{type(error).__name__}: {error}".split("\n")[0].rstrip(".")
