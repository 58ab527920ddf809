"""Token sequences for a datastore: rollouts, JSON lines, text files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from thornback.contracts import DataError
from thornback.data.files import BadRow, data_files, open_location, read_rows
from thornback.data.readers import BadRowReport

_TABLES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", "")


@dataclass(slots=True)
class Documents:
    """What was read: int64 token ids of each document, and the rows that were left out."""

    token_ids: list[np.ndarray] = field(default_factory=list)
    bad_rows: list[BadRowReport] = field(default_factory=list)

    def checked(self, max_bad_rows: int = 0) -> list[np.ndarray]:
        """Raises `DataError` for more bad rows than that, and where there is no document at all."""
        if len(self.bad_rows) > max_bad_rows:
            first = "; ".join(map(str, self.bad_rows[:3])) + ("; ..." if len(self.bad_rows) > 3 else "")
            raise DataError(f"Bad rows: {len(self.bad_rows)} ({first}); mend them, or allow some with --max-bad-rows.")
        if not self.token_ids:
            raise DataError("The sources hold no documents.")
        return self.token_ids


def read_documents(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, column: str = "text") -> Documents:
    """Of each source: rows of Parquet, Arrow and JSON lines with token ids (a rollout's `prompt_ids` and
    `response_ids`, or `token_ids`) or a text in `column`; any other file is one text."""
    found = Documents()
    for source in sources:
        for file, number, document in _documents(source, column):
            if isinstance(document, BadRow):
                found.bad_rows.append(BadRowReport(file, number, document))
            elif isinstance(document, str):
                ids = tokenizer.encode(document, add_special_tokens=False)
                found.token_ids.append(np.asarray(ids, np.int64))
            else:
                found.token_ids.append(document)
    return found


def _documents(source: str, column: str) -> Iterator[tuple[str, int, np.ndarray | str | BadRow]]:
    if PurePosixPath(source).suffix not in _TABLES:
        yield source, 1, _text(source)
        return
    files = data_files(source)
    if files is None:
        raise DataError(f"{source} does not exist; give a file or a directory.")
    for file in files:
        for number, row in read_rows(file):
            yield file, number, row if isinstance(row, BadRow) else _document(row, column)


def _text(location: str) -> str | BadRow:
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read().decode("utf-8") or BadRow("empty")
    except UnicodeDecodeError:
        return BadRow("no UTF-8 text")
    except OSError as error:
        raise DataError(f"{location} cannot be read: {str(error).splitlines()[0]}.") from error


def _document(row: dict[str, Any], column: str) -> np.ndarray | str | BadRow:
    if "prompt_ids" in row and "response_ids" in row:
        return _token_ids([*(row["prompt_ids"] or ()), *(row["response_ids"] or ())])
    if "token_ids" in row:
        return _token_ids(row["token_ids"])
    if column not in row:
        return BadRow(f'no column "{column}", and no token ids; it has {", ".join(sorted(row)) or "none"}')
    text = row[column]
    if not isinstance(text, str) or not text:
        return BadRow(f'"{column}" is {"empty" if text in ("", None) else f"a {type(text).__name__}, not a text"}')
    return text


def _token_ids(values: Any) -> np.ndarray | BadRow:
    if not isinstance(values, list) or not values:
        return BadRow("no token ids")
    if not all(type(value) is int and 0 <= value < 1 << 31 for value in values):
        return BadRow("token ids that are no whole numbers from 0 on")
    return np.asarray(values, np.int64)
