"""Datasets to prompts: JSON lines, Parquet, Hugging Face directories and hub names, in the columns people publish.

Every row is checked. What is no prompt is reported by file and row, counted, and never reaches an actor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from thornback.contracts import DataError, Prompt
from thornback.data.files import BadRow, data_files, read_rows

_PROMPT_COLUMNS = ("messages", "prompt", "question", "problem", "query", "instruction")
_ANSWER_COLUMNS = ("answer", "final_answer", "solution", "target", "label")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class BadRowReport:
    """One row that is no prompt: where it stands and why."""

    file: str
    row: int
    cause: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.cause}"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What was read: prompts in the order of files and rows, the rows that were left out, and how many said again
    what an earlier one had said (DAPO-Math-17k repeats each problem about a hundred times)."""

    location: str
    prompts: list[Prompt]
    bad_rows: list[BadRowReport] = field(default_factory=list)
    num_duplicates: int = 0

    def checked(self, max_bad_rows: int = 0) -> list[Prompt]:
        """The prompts. Raises `DataError` for more bad rows than that, and where there is no prompt at all."""
        if len(self.bad_rows) > max_bad_rows:
            first = "; ".join(map(str, self.bad_rows[:3])) + ("; ..." if len(self.bad_rows) > 3 else "")
            many = "1 bad row" if len(self.bad_rows) == 1 else f"{len(self.bad_rows)} bad rows"
            raise DataError(
                f"{self.location} has {many} of {len(self.prompts) + len(self.bad_rows)} ({first}); "
                "mend them, or allow some with max_bad_rows."
            )
        if not self.prompts:
            raise DataError(f"{self.location} holds no prompts.")
        return self.prompts


def read_prompts(
    location: str | Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
    needs_answer: bool = False,
    count_tokens: Callable[[Sequence[Mapping[str, str]]], int] | None = None,
    max_prompt_tokens: int | None = None,
    distributed: bool = False,
) -> PromptSet:
    """Read prompts from one location or several.

    `columns`: the dataset's names of `prompt`, `answer` and `key`, where they differ from the usual ones. A prompt
    is text, or a list of chat messages (a closing assistant message is taken off: the model writes it). `answer`
    may be GSM8K's ("... #### 42") or DAPO-Math-17k's (`reward_model: {ground_truth}`). With `count_tokens` and
    `max_prompt_tokens`, longer prompts count as bad. `distributed` reads the files as Ray Data tasks.
    """
    locations = [location] if isinstance(location, str) else list(location)
    check = RowCheck(dict(columns or {}), needs_answer, count_tokens, max_prompt_tokens)
    rows: list[Prompt | BadRowReport] = []
    for place in locations:
        files = data_files(place, split)
        if files is None:
            rows += check.rows(place, _hub_rows(place, split, subset))
        elif distributed:
            rows += _distributed(files, check)
        else:
            rows += (row for file in files for row in check.rows(file, read_rows(file)))
    prompts = [row for row in rows if isinstance(row, Prompt)]
    bad = [row for row in rows if isinstance(row, BadRowReport)]
    unique = each_once(prompts)
    return PromptSet(", ".join(locations), unique, bad, len(prompts) - len(unique))


def each_once(prompts: list[Prompt]) -> list[Prompt]:
    """Each problem once, under a key of its own: seeds and anchors hang on keys. Files of one name get a number."""
    said: set[tuple] = set()
    seen: dict[str, int] = {}
    result = []
    for prompt in prompts:
        content = (*((m["role"], m["content"]) for m in prompt.messages), prompt.answer)
        if content in said:
            continue
        said.add(content)
        count = seen[prompt.key] = seen.get(prompt.key, 0) + 1
        key = prompt.key if count == 1 else f"{prompt.key}#{count}"
        result.append(Prompt(key, prompt.messages, prompt.answer, prompt.extra))
    return result


def _distributed(files: list[str], check: RowCheck) -> list[Prompt | BadRowReport]:
    """One Ray Data task a file; blocks come back in the order of the files."""
    from ray import data as ray_data

    def read(item: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"row": _packed(row)} for row in check.rows(item["file"], read_rows(item["file"]))]

    ray_data.DataContext.get_current().execution_options.preserve_order = True
    dataset = ray_data.from_items([{"file": f} for f in files], override_num_blocks=len(files)).flat_map(read)
    return [_unpacked(item["row"]) for item in dataset.iter_rows()]


def _packed(row: Prompt | BadRowReport) -> str:
    """As JSON: rows of different files need no common Arrow schema. What JSON lacks (dates) becomes text."""
    return json.dumps([type(row).__name__, asdict(row)], default=str)


def _unpacked(text: str) -> Prompt | BadRowReport:
    kind, values = json.loads(text)
    if kind == BadRowReport.__name__:
        return BadRowReport(**values)
    return Prompt(**{**values, "messages": tuple(values["messages"])})


def _hub_rows(name: str, split: str | None, subset: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, subset, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds, of the network and of its own
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{name} is no path here, and the hub did not give it ({reason}).") from error
    return enumerate(dataset, start=1)


@dataclass(frozen=True, slots=True)
class RowCheck:
    """Turns a row into a prompt, or says why it is none."""

    columns: dict[str, str]
    needs_answer: bool
    count_tokens: Callable[[Sequence[Mapping[str, str]]], int] | None
    max_prompt_tokens: int | None

    def rows(self, file: str, rows: Iterable[tuple[int, dict[str, Any] | BadRow]]) -> Iterator[Prompt | BadRowReport]:
        for number, row in rows:
            result = row if isinstance(row, BadRow) else self.prompt(row, file, number)
            yield BadRowReport(file, number, str(result)) if isinstance(result, BadRow) else result

    def prompt(self, row: dict[str, Any], file: str, number: int) -> Prompt | BadRow:
        column = self.columns.get("prompt") or next((c for c in _PROMPT_COLUMNS if row.get(c) is not None), None)
        if column is None or column not in row:
            known = f'the column "{column}"' if column else f"a column of {', '.join(_PROMPT_COLUMNS)}"
            return BadRow(f"it lacks {known}")
        messages = _messages(row[column], column)
        if isinstance(messages, BadRow):
            return messages
        answer = self._answer(row)
        if isinstance(answer, BadRow):
            return answer
        if self.count_tokens and self.max_prompt_tokens:
            length = self.count_tokens(messages)
            if length > self.max_prompt_tokens:
                return BadRow(f"its prompt has {length} tokens, more than {self.max_prompt_tokens}")
        named = row.get(self.columns.get("key", "key"))
        key = str(named) if named is not None else f"{PurePosixPath(file).stem}:{number}"
        extra = {name: value for name, value in row.items() if name != column}
        return Prompt(key, messages, answer, {**extra, "source": f"{file}:{number}"})

    def _answer(self, row: dict[str, Any]) -> str | BadRow | None:
        if "answer" in self.columns:
            value = row.get(self.columns["answer"])
        elif isinstance(row.get("reward_model"), Mapping):  # DAPO-Math-17k
            value = row["reward_model"].get("ground_truth")
        else:
            value = next((row[c] for c in _ANSWER_COLUMNS if row.get(c) is not None), None)
        if value is None:
            return BadRow("it has no answer") if self.needs_answer else None
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return BadRow(f"its answer is a {type(value).__name__}, not text or a number")
        text = str(value).rpartition("####")[2].strip()  # GSM8K ends its reasoning with "#### 42"
        return text or (BadRow("its answer is empty") if self.needs_answer else None)


def _messages(value: Any, column: str) -> tuple[dict[str, str], ...] | BadRow:
    """A prompt column as chat messages that end where the assistant is to answer."""
    if isinstance(value, str):
        if not value.strip():
            return BadRow(f'its "{column}" is empty')
        return ({"role": "user", "content": value},)
    if not isinstance(value, (list, tuple)):
        return BadRow(f'its "{column}" is a {type(value).__name__}, not text or a list of messages')
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            return BadRow(f'its "{column}" holds {message!r:.60}, which is no chat message')
        if not isinstance(message.get("content"), str):
            return BadRow(f'its "{column}" has a message whose content is no text')
        messages.append({"role": message["role"], "content": message["content"]})
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        return BadRow(f'its "{column}" has no user message with text')
    return tuple(messages)
