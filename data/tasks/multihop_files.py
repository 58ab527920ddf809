"""Readers of the published multi-hop datasets: MuSiQue, 2WikiMultihopQA and HotpotQA, in their own files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from thornback.contracts import Prompt
from thornback.data.files import BadRow, read_checked
from thornback.data.readers import each_once
from thornback.data.tasks.drawing import is_held_out


@dataclass(frozen=True, slots=True)
class Row:
    """A question with the paragraphs, title and text, that come with it, some of which answer it."""

    prompt: Prompt
    paragraphs: tuple[str, ...]


class MultihopFiles:
    """Questions and paragraphs of `path` (a file, a directory, any pyarrow.fs location), and of `test_path`."""

    def __init__(self, path: str, test_path: str | None, held_out_share: float, max_bad_rows: int) -> None:
        self.path = path
        self.test_path = test_path
        self.held_out_share = held_out_share
        self.max_bad_rows = max_bad_rows

    def prompts(self, split: str) -> Iterator[Prompt]:
        if self.test_path is not None:
            return iter(each_once([row.prompt for row in (self._test if split == "test" else self._train)]))
        held_out = split == "test"
        return (
            prompt for prompt in each_once([r.prompt for r in self._train]) if self._is_held_out(prompt) == held_out
        )

    def documents(self) -> list[str]:
        """Every paragraph, once: models search in those of all questions."""
        rows = [*self._train, *(self._test if self.test_path is not None else ())]
        return list(dict.fromkeys(paragraph for row in rows for paragraph in row.paragraphs))

    @cached_property
    def _train(self) -> list[Row]:
        return read_multihop(self.path, "train", self.max_bad_rows)

    @cached_property
    def _test(self) -> list[Row]:
        assert self.test_path is not None
        return read_multihop(self.test_path, "test", self.max_bad_rows)

    def _is_held_out(self, prompt: Prompt) -> bool:
        return is_held_out(prompt.messages[-1]["content"], self.held_out_share)


def read_multihop(location: str, split: str | None = None, max_bad_rows: int = 0) -> list[Row]:
    """The rows of a location. Raises `DataError` for more bad rows than `max_bad_rows`, with file and row, and where
    there are none. MuSiQue's unanswerable questions are left out."""

    def parse(row: dict[str, Any]) -> Row | BadRow | None:
        return _read(row) if row.get("answerable", True) else None

    return read_checked([location], split, parse, "multi-hop questions", max_bad_rows)


def _read(row: Mapping[str, Any]) -> Row | BadRow:
    """One row in any of the three forms."""
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return BadRow(f"no {name}")
    try:
        paragraphs, hops = _musique(row) if "paragraphs" in row else _hotpot(row)
    except (KeyError, TypeError, ValueError) as error:
        return BadRow(f"no paragraphs that can be read ({type(error).__name__}: {error})")
    key = str(row.get("id") or row.get("_id") or row["question"])
    extra = {"hops": max(1, hops), "aliases": tuple(row.get("answer_aliases") or row.get("aliases") or ())}
    prompt = Prompt(key, ({"role": "user", "content": row["question"]},), row["answer"], extra)
    return Row(prompt, paragraphs)


def _musique(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """`paragraphs`: title, paragraph_text, is_supporting; `question_decomposition`: one step a hop."""
    found = row["paragraphs"]
    paragraphs = tuple(f"{p['title']}: {p['paragraph_text']}" for p in found)
    steps = row.get("question_decomposition")
    return paragraphs, len(steps) if steps else sum(bool(p.get("is_supporting")) for p in found)


def _hotpot(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """`context`: [title, sentences] pairs, or lists of both (the hub's form); `supporting_facts` likewise. Strings of
    JSON, as in 2WikiMultihopQA's Parquet files, are parsed."""
    context, facts = (_parsed(row[name]) for name in ("context", "supporting_facts"))
    paragraphs = tuple(f"{title}: {''.join(sentences).strip()}" for title, sentences in _pairs(context, "sentences"))
    if not paragraphs:
        raise ValueError("context is empty")
    return paragraphs, len({title for title, _ in _pairs(facts, "sent_id")})


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _pairs(value: Any, second: str) -> Sequence[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return list(zip(value["title"], value.get(second, value.get("content", ())), strict=True))
    return [(title, other) for title, other in value]
