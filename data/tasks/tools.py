"""Function calling in ToolRL's style (arXiv 2504.13958): which tools, with which arguments."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING, Any

from thornback.contracts import Completion, ConfigError, Prompt, Reward
from thornback.data.readers import read_prompts
from thornback.data.tasks.drawing import distinct, is_held_out
from thornback.data.tasks.tools_requests import MAX_TOOLS, WORDS, ToolRequest, requests

if TYPE_CHECKING:
    from thornback.data.demonstrations import Demonstration

Call = dict[str, Any]  # {"name": ..., "parameters": {...}}
_REPLY = re.compile(
    r"\s*<think>.+?</think>\s*(<tool_call>.+?</tool_call>)?\s*(<response>.+?</response>)?\s*", re.DOTALL
)
_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_MOST_PERMUTED = 6  # calls that are matched in every order


def calls_in(text: str) -> list[Call] | None:
    """The calls of a reply, one line of JSON each; None where a line is no call."""
    calls = []
    for line in (line.strip() for block in _BLOCK.findall(text) for line in block.splitlines()):
        if not line:
            continue
        try:
            call = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
            return None
        if not isinstance(call.get("parameters", {}), dict):
            return None
        calls.append({"name": call["name"], "parameters": call.get("parameters", {})})
    return calls


def wanted_calls(prompt: Prompt) -> list[Call]:
    return calls_in(prompt.answer or "") or []


def name_match(made: Sequence[Call], wanted: Sequence[Call]) -> float:
    """ToolRL's r_name: names that were called and wanted, over those that were either. 1 where there are none."""
    ours, theirs = (Counter(call["name"] for call in calls) for calls in (made, wanted))
    either = (ours | theirs).total()
    return (ours & theirs).total() / either if either else 1.0


def argument_match(made: Sequence[Call], wanted: Sequence[Call]) -> float:
    """ToolRL's r_param + r_value over their largest value, calls of one name matched as well as can be. `wanted` is not
    empty."""
    best = sum(_best(list(of_name), [c for c in made if c["name"] == name]) for name, of_name in _by_name(wanted))
    return best / sum(1 + len(call["parameters"]) for call in wanted)


def _by_name(calls: Sequence[Call]) -> list[tuple[str, list[Call]]]:
    names = dict.fromkeys(call["name"] for call in calls)
    return [(name, [call for call in calls if call["name"] == name]) for name in names]


def _best(wanted: list[Call], made: list[Call]) -> float:
    if max(len(wanted), len(made)) > _MOST_PERMUTED:  # in the order in which they stand
        return sum(_similarity(*pair) for pair in zip(wanted, made, strict=False))
    short, long = sorted((wanted, made), key=len)
    return max((sum(map(_similarity, short, order)) for order in permutations(long, len(short))), default=0.0)


def _similarity(one: Call, other: Call) -> float:
    """Names of parameters that agree, over all of them, and the number of values that agree."""
    ours, theirs = one["parameters"], other["parameters"]
    either = {*ours, *theirs}
    names = len(ours.keys() & theirs.keys()) / len(either) if either else 1.0
    return names + sum(name in ours and name in theirs and ours[name] == theirs[name] for name in either)


@dataclass(frozen=True)
class ReplyFormat:
    """1 for a thought, then calls, a response, or both, in their tags and with nothing outside; else 0."""

    name: str = "format"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        found = _REPLY.fullmatch(completion.text)
        return float(bool(found and any(found.groups()) and calls_in(completion.text) is not None))


@dataclass(frozen=True)
class Tool:
    """Whether the tools are those that were wanted: `name_match`."""

    name: str = "tool"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        made = calls_in(completion.text)
        return 0.0 if made is None else name_match(made, wanted_calls(completion.prompt))


@dataclass(frozen=True)
class Arguments:
    """Whether they get what they should: `argument_match`. Does not apply where no call is wanted."""

    name: str = "arguments"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float | None:
        wanted = wanted_calls(completion.prompt)
        return argument_match(calls_in(completion.text) or [], wanted) if wanted else None


class ToolsTask:
    """Requests that are answered by calls, lines of JSON within `<tool_call>` tags.

    With `path` (a file, a directory, any pyarrow.fs location, a hub name), rows as ToolRL publishes them: a
    conversation that describes the tools, and as its answer an exemplary reply. Without, requests made from `seed`, of
    one to `max_calls` calls among `num_tools` that are listed, whose names vary from request to request; `words` is
    their vocabulary. A request is held out if the hash of its text says so. Rewards: `format`, `tool`, `arguments`.
    """

    name = "tools"

    def __init__(
        self,
        path: str | None = None,
        held_out_share: float = 0.1,
        max_bad_rows: int = 0,
        num_tools: int = 3,
        max_calls: int = 2,
        num_train: int = 1024,
        num_test: int = 512,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> None:
        if not (0 < held_out_share < 1 and 1 <= max_calls <= num_tools <= MAX_TOOLS):
            raise ConfigError(
                f"The task tools wants held_out_share in (0, 1) and 1 <= max_calls <= num_tools <= {MAX_TOOLS}."
            )
        self.path = path
        self.held_out_share = held_out_share
        self.max_bad_rows = max_bad_rows
        self.num_tools = num_tools
        self.max_calls = max_calls
        self.sizes = {"train": num_train, "test": num_test}
        self.seed = seed
        self.system_prompt = system_prompt
        self.words = WORDS if path is None else ()
        self.rewards: tuple[Reward, ...] = (ReplyFormat(), Tool(), Arguments())

    def prompts(self, split: str) -> Iterator[Prompt]:
        """Raises `DataError` for missing files, and for more bad rows than `max_bad_rows`."""
        if split not in self.sizes:
            raise ConfigError(f'The task tools has the splits train and test, not "{split}".')
        if self.path is None:
            return map(prompt_of, self.requests(split))
        held_out, share = split == "test", self.held_out_share
        return (row for row in self._rows if is_held_out(row.messages[-1]["content"], share) == held_out)

    def requests(self, split: str) -> Iterator[ToolRequest]:
        """The split's made-up requests, each once."""
        drawn = requests(self.num_tools, self.max_calls, [self.seed, split == "test"])
        ours = (r if is_held_out(r.text, self.held_out_share) == (split == "test") else None for r in drawn)

        def refuse(found: int) -> ConfigError:
            return ConfigError(
                f"The task tools has only about {found} {split} requests of {self.max_calls} calls among "
                f"{self.num_tools} tools, but {self.sizes[split]} were asked for; allow more tools or calls."
            )

        return distinct(ours, self.sizes[split], lambda request: request.text, refuse)

    @cached_property
    def _rows(self) -> list[Prompt]:
        assert self.path is not None
        return read_prompts(self.path, needs_answer=True).checked(self.max_bad_rows)

    def is_correct(self, completion: Completion) -> bool:
        """Exactly the calls that were wanted, in any order."""
        made, wanted = calls_in(completion.text), wanted_calls(completion.prompt)
        if made is None or name_match(made, wanted) < 1.0:
            return False
        return not wanted or argument_match(made, wanted) == 1.0

    def demonstrations(self, count: int, seed: int = 0, **flaws: float) -> list[Demonstration]:
        """Imperfect replies to made-up training requests; `flaws` are fields of `CallFlaws`."""
        from thornback.data.tasks.tools_requests import CallFlaws, make_replies

        if self.path is not None:
            raise ConfigError("The task tools gives demonstrations of made-up requests only; leave warm_start out.")
        try:
            return make_replies(self, count, seed, CallFlaws(**flaws))
        except TypeError as error:
            raise ConfigError(f"The demonstrations of the task tools: {error}.") from None


def prompt_of(request: ToolRequest) -> Prompt:
    return Prompt(request.text, ({"role": "user", "content": request.text},), request.reply())
