"""A task of one's own, by import path: calling tools, judged against the calls that were asked for.

    task: {name: "recipes.tool_use:ToolUse", options: {path: data/toolrl}}

A row holds the conversation with the tools' descriptions, and as its answer an exemplary reply with lines of JSON
inside `<tool_call>` tags (ToolRL's form). How calls are scored here is our own choice, not a paper's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from thornback.contracts import Completion, Prompt
from thornback.data import read_prompts

Call = dict[str, Any]  # {"name": ..., "parameters": {...}}
_REPLY = re.compile(
    r"\s*<think>.+?</think>\s*(<tool_call>.+?</tool_call>)?\s*(<response>.+?</response>)?\s*", re.DOTALL
)


def calls_in(text: str) -> list[Call] | None:
    """The calls of a reply, one line of JSON each; None where a line is no call."""
    calls = []
    for block in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL):
        for line in filter(None, map(str.strip, block.splitlines())):
            try:
                call = json.loads(line)
            except ValueError:
                return None
            if not (isinstance(call, dict) and "name" in call and isinstance(call.get("parameters", {}), dict)):
                return None
            calls.append({"name": call["name"], "parameters": call.get("parameters", {})})
    return calls


def similarity(call: Call, wanted: Call) -> float:
    """1 for the same call; 0 for another tool; between them a half, and the share of parameters that agree."""
    if call["name"] != wanted["name"]:
        return 0.0
    names = {*call["parameters"], *wanted["parameters"]}
    missing = object()
    agree = sum(call["parameters"].get(n, missing) == wanted["parameters"].get(n, missing) for n in names)
    return 0.5 + 0.5 * (agree / len(names) if names else 1.0)


@dataclass(frozen=True)
class Calls:
    """How near the calls are to those wanted, in order: mean similarity, calls too many or too few counting 0."""

    name: str = "calls"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        wanted = calls_in(completion.prompt.answer or "") or []
        made = calls_in(completion.text)
        if made is None:
            return 0.0
        longest = max(len(made), len(wanted))
        return sum(map(similarity, made, wanted)) / longest if longest else 1.0


@dataclass(frozen=True)
class ReplyFormat:
    """1 for a thought, then calls, a response, or both, in their tags and with nothing outside; else 0."""

    name: str = "format"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        found = _REPLY.fullmatch(completion.text)
        return float(bool(found and any(found.groups()) and calls_in(completion.text) is not None))


class ToolUse:
    """Rows of `path` (a file, a directory, any pyarrow.fs location); a share of them, by hash, is held out."""

    name = "tool_use"
    system_prompt = None
    rewards = (Calls(), ReplyFormat())

    def __init__(self, path: str, held_out_share: float = 0.1) -> None:
        self.path = path
        self.held_out_share = held_out_share

    def prompts(self, split: str) -> Iterator[Prompt]:
        """Raises `DataError` for missing files and bad rows."""
        rows = read_prompts(self.path, needs_answer=True).checked()
        return (row for row in rows if self._is_held_out(row) == (split == "test"))

    def is_correct(self, completion: Completion) -> bool:
        """Exactly the calls that were wanted."""
        return Calls()(completion) == 1.0

    def _is_held_out(self, prompt: Prompt) -> bool:
        digest = hashlib.blake2b(prompt.messages[-1]["content"].encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.held_out_share * 2**64
