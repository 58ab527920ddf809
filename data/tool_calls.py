"""Tool calls in a model's text, Hermes style: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of a call's arguments: JSON text as the model wrote it."""

    index: int
    text: str


Event = Content | CallStart | CallArguments


class ToolCallParser:
    """Splits a growing text into content and calls; arguments go out while they are written.

    What is no call in the end (broken JSON within the tags) is content again. Blank space around calls is dropped.
    `inside`: the text begins within the first call, whose opening tag ended the prompt.
    """

    def __init__(self, inside: bool = False, max_calls: int | None = None) -> None:
        self._read = self._read_head if inside else self._read_content
        self._buffer = ""
        self._blank = ""  # white space that is content only if more content follows
        self._max_calls = max_calls
        self._scanner = _ObjectScanner()
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        return self._drain()

    def flush(self) -> list[Event]:
        """What is left at the end of the text."""
        events = self._drain()
        if self._read == self._read_head and self._buffer:
            events += self._whole(self._buffer, closed=False)
        elif self._read == self._read_content:
            text = self._blank + self._buffer
            if text.strip() or not self.num_calls:
                events += [Content(text)] if text else []
        self._buffer = self._blank = ""
        return events

    def _drain(self) -> list[Event]:
        events: list[Event] = []
        while True:
            before = (self._read, len(self._buffer))
            events += self._read()
            if before == (self._read, len(self._buffer)):
                return events

    def _read_content(self) -> list[Event]:
        place = self._buffer.find(OPEN)
        if place >= 0:
            text, self._buffer = self._buffer[:place], self._buffer[place + len(OPEN) :]
            self._read = self._read_head
        else:
            keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._buffer.endswith(OPEN[:n])), 0)
            cut = len(self._buffer) - keep
            text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        text = self._blank + text
        shown = text.rstrip()
        self._blank = "" if place >= 0 else text[len(shown) :]
        return [Content(shown)] if shown else []

    def _read_head(self) -> list[Event]:
        head = _HEAD.match(self._buffer)
        if head:
            self._buffer = self._buffer[head.end() :]
            self._scanner = _ObjectScanner()
            self._read = self._read_arguments
            return self._start(json.loads(head[1]))
        place = self._buffer.find(CLOSE)
        if place < 0:
            return []
        text, self._buffer = self._buffer[:place], self._buffer[place + len(CLOSE) :]
        self._read = self._read_content
        return self._whole(text, closed=True)

    def _read_arguments(self) -> list[Event]:
        end = self._scanner.scan(self._buffer)
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if self._scanner.done:
            self._read = self._read_tail
        return self._arguments(text) if text else []

    def _read_tail(self) -> list[Event]:
        place = self._buffer.find(CLOSE)
        if place >= 0:
            self._buffer = self._buffer[place + len(CLOSE) :]
            self._read = self._read_content
        return []

    def _whole(self, text: str, closed: bool) -> list[Event]:
        """A call that could not be read as it came: its fields stand in another order, or it is none."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [Content(OPEN + text + (CLOSE if closed else ""))]
        if not isinstance(name, str):
            return [Content(OPEN + text + (CLOSE if closed else ""))]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return self._start(name) + self._arguments(written)

    def _start(self, name: str) -> list[Event]:
        self.num_calls += 1
        if self._surplus:
            return []
        return [CallStart(self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)]

    def _arguments(self, text: str) -> list[Event]:
        return [] if self._surplus else [CallArguments(self.num_calls - 1, text)]

    @property
    def _surplus(self) -> bool:
        return self._max_calls is not None and self.num_calls > self._max_calls


def parse_tool_calls(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The content of a whole text; and its calls, each a name and arguments, JSON text as the model wrote it."""
    parser = ToolCallParser()
    content, calls = "", []
    for event in (*parser.push(text), *parser.flush()):
        match event:
            case Content(said):
                content += said
            case CallStart(_, _, name):
                calls.append((name, ""))
            case CallArguments(index, written):
                calls[index] = (calls[index][0], calls[index][1] + written)
    return content, calls


class _ObjectScanner:
    """Finds where a JSON object ends, over pieces of its text."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.done = False

    def scan(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for i, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return i + 1
        return len(text)
