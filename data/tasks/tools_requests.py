"""Made-up requests for tools, and imperfect replies to them for the warm start."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thornback.data.demonstrations import Demonstration
from thornback.data.tasks.multihop_world import NAMES

if TYPE_CHECKING:
    from thornback.data.tasks.tools import ToolsTask

_PLACES = NAMES["city"][:32]
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NUMBERS = tuple(str(n) for n in range(2, 13))
_PEOPLE = NAMES["person"][:32]


@dataclass(frozen=True, slots=True)
class _Tool:
    """One thing that can be asked for: names that a tool for it may have, its parameters likewise, each with what can
    be said for it, and how people ask."""

    names: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    values: tuple[tuple[str, ...], ...]
    phrase: str


_TOOLS = (
    _Tool(
        ("weather", "forecast", "sky"), (("city", "place"), ("day", "date")), (_PLACES, _DAYS), "weather in {} on {}"
    ),
    _Tool(
        ("route", "path", "way"), (("from", "start"), ("to", "goal")), (_PLACES, _PLACES), "how to get from {} to {}"
    ),
    _Tool(
        ("table", "dinner", "seats"), (("count", "guests"), ("day", "date")), (_NUMBERS, _DAYS), "dinner for {} on {}"
    ),
    _Tool(("call", "phone", "ring"), (("who", "person"), ("hour", "time")), (_PEOPLE, _NUMBERS), "a call to {} at {}"),
    _Tool(("ticket", "train", "ride"), (("to", "goal"), ("hour", "time")), (_PLACES, _NUMBERS), "a train to {} at {}"),
)
MAX_TOOLS = len(_TOOLS)
_GLUE = (
    *('{"name": "', '", "parameters": {"', '": "', '", "', '"}}', "<response>", "</response>"),
    *(
        "Tools:",
        "Please:",
        "weather in",
        "how to get",
        "dinner for",
        "a call",
        "a train",
        " on ",
        " from ",
        " to ",
        " at ",
    ),
)
WORDS = tuple(
    dict.fromkeys(
        [
            *_GLUE,
            *(name for tool in _TOOLS for names in (tool.names, *tool.parameters) for name in names if len(name) > 2),
            *(value for values in (_PLACES, _DAYS, _PEOPLE) for value in values),
        ]
    )
)


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """`listed`: the tools that there are, name and parameters; `wanted`: the calls that do what is asked."""

    text: str
    listed: tuple[tuple[str, tuple[str, ...]], ...]
    wanted: tuple[tuple[str, Mapping[str, str]], ...]

    def reply(self) -> str:
        """An exemplary one."""
        return reply_of([(name, dict(parameters)) for name, parameters in self.wanted])


def reply_of(calls: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    lines = [json.dumps({"name": name, "parameters": dict(parameters)}) for name, parameters in calls]
    thought = ",".join(name for name, _ in calls)
    return "\n".join([f"<think>{thought}</think>", "<tool_call>", *lines, "</tool_call>"])


def requests(num_tools: int, max_calls: int, seed: Sequence[int]) -> Iterator[ToolRequest]:
    """An endless stream of them."""
    rng = np.random.default_rng(seed)

    def one_of(choices: Sequence[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    while True:
        tools = [_TOOLS[i] for i in rng.permutation(len(_TOOLS))[:num_tools]]
        listed = tuple((one_of(tool.names), tuple(map(one_of, tool.parameters))) for tool in tools)
        asked = rng.permutation(len(tools))[: int(rng.integers(1, max_calls + 1))]
        phrases, wanted = [], []
        for i in asked:
            values = [one_of(values) for values in tools[i].values]
            name, parameters = listed[i]
            phrases.append(tools[i].phrase.format(*values))
            wanted.append((name, dict(zip(parameters, values, strict=True))))
        described = "; ".join(f"{name}({', '.join(parameters)})" for name, parameters in listed)
        yield ToolRequest(f"Tools: {described}\nPlease: {', '.join(phrases)}", listed, tuple(wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFlaws:
    """How often a call or a reply is spoiled, each chance by itself: another tool; another tool's parameter; a missing
    parameter; another value; a call too few or too many; a tag that is missing."""

    wrong_tool: float = 0.10
    wrong_parameter: float = 0.10
    missing: float = 0.10
    wrong_value: float = 0.10
    wrong_count: float = 0.10
    broken_tags: float = 0.15


def make_replies(task: ToolsTask, count: int, seed: int, flaws: CallFlaws) -> list[Demonstration]:
    """`count` imperfect replies to training requests."""
    from thornback.data.tasks.tools import prompt_of

    rng = np.random.default_rng([seed, 17])
    asked = list(task.requests("train"))
    return [
        Demonstration(prompt_of(asked[i]), _spoiled_reply(asked[i], flaws, rng))
        for i in rng.integers(len(asked), size=count)
    ]


def _spoiled_reply(request: ToolRequest, flaws: CallFlaws, rng: np.random.Generator) -> str:
    calls = [_spoiled(call, request, flaws, rng) for call in request.wanted]
    if rng.random() < flaws.wrong_count:
        calls = calls[1:] if len(calls) > 1 else [*calls, *calls]
    text = reply_of(calls)
    if rng.random() < flaws.broken_tags:
        tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        text = text.replace(tags[int(rng.integers(len(tags)))], "")
    return text


def _spoiled(
    call: tuple[str, Mapping[str, str]], request: ToolRequest, flaws: CallFlaws, rng: np.random.Generator
) -> tuple[str, Mapping[str, str]]:
    name, parameters = call[0], dict(call[1])
    if rng.random() < flaws.wrong_tool:
        name = request.listed[int(rng.integers(len(request.listed)))][0]
    if rng.random() < flaws.missing:
        parameters.pop(next(iter(parameters)))
    if parameters and rng.random() < flaws.wrong_parameter:
        old = next(iter(parameters))
        others = [other for _, names in request.listed for other in names if other not in parameters]
        if others:
            parameters = {others[int(rng.integers(len(others)))]: parameters.pop(old), **parameters}
    if parameters and rng.random() < flaws.wrong_value:
        some = list(parameters)[-1]
        parameters[some] = _PLACES[int(rng.integers(len(_PLACES)))]
    return name, parameters
