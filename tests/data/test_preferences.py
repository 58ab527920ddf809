"""Preference pairs in the forms in which they are published."""

from __future__ import annotations

import json

import pytest

from thornback.contracts import DataError
from thornback.data import read_preferences

USER = {"role": "user", "content": "2+2=?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2=?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": "4", "rejected": "5"},
        {"chosen": [USER, said("4")], "rejected": [USER, said("5")]},
        {"prompt": "2+2=?", "chosen": [USER, said("4")], "rejected": [USER, said("5")]},
        {"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]},
    ],
)
def test_forms(tmp_path, row):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (pair,) = read_preferences([str(tmp_path)])
    assert pair.messages == (USER,)
    assert (pair.chosen, pair.rejected) == ("4", "5")


def test_bad_rows_are_named(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b"},
        {"chosen": "a", "rejected": "b"},
        {"chosen": [USER, said("4")], "rejected": [said("x"), said("5")]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        DataError, match=r"4 bad rows of 5 .*jsonl:2: both answers are the same.*:3: no chosen and rejected"
    ):
        read_preferences([str(file)])
    assert len(read_preferences([str(file)], max_bad_rows=4)) == 1
    with pytest.raises(DataError, match="does not exist"):
        read_preferences(["nobody/nothing"])
