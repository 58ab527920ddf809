"""Preference pairs: of two answers to a prompt, which one people (or a stronger judge) liked better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thornback.contracts import Message
from thornback.data.files import BadRow, read_checked

_PROMPTS = ("prompt", "question", "instruction", "messages")


@dataclass(frozen=True, slots=True)
class Preference:
    """`chosen` was liked better than `rejected` as the assistant's answer to `messages`."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str


def read_preferences(locations: Sequence[str], max_bad_rows: int = 0) -> list[Preference]:
    """Pairs from files, directories, or any pyarrow.fs locations. A row has `chosen` and `rejected`: texts, beside a
    `prompt` that is text or chat messages; or whole conversations that begin alike, as TRL and UltraFeedback have them.

    Raises `DataError` for more bad rows than `max_bad_rows`, with file and row, and where there is no pair.
    """
    return read_checked(locations, "train", _pair, "preference pairs", max_bad_rows)


def _pair(row: Mapping[str, Any]) -> Preference | BadRow:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    try:
        if isinstance(chosen, str) and isinstance(rejected, str):
            prompt = next((row[name] for name in _PROMPTS if row.get(name)), None)
            messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else _messages(prompt)
        else:
            ours, theirs = _messages(chosen), _messages(rejected)
            if ours[:-1] != theirs[:-1] and len(ours) > 1:
                return BadRow("chosen and rejected do not begin alike")
            messages, chosen, rejected = ours[:-1], ours[-1]["content"], theirs[-1]["content"]
            messages = messages or _messages(row.get("prompt"))
    except (TypeError, KeyError, IndexError):
        return BadRow("no chosen and rejected answers to a prompt")
    if not messages or chosen == rejected:
        return BadRow("no prompt" if not messages else "both answers are the same")
    return Preference(messages, chosen, rejected)


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    return tuple({"role": str(message["role"]), "content": str(message["content"])} for message in value)
