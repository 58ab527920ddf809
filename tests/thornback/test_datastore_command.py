"""`thornback datastore` as a user runs it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thornback.cli import main
from thornback.data import Datastore, load_tokenizer, tokenizer_fingerprint


@pytest.fixture
def sources(tmp_path, tiny_model):
    model = tiny_model("qwen3")
    tokenizer = load_tokenizer(model)
    (tmp_path / "lines.jsonl").write_text('{"text": "seven apples"}\n{"token_ids": [5, 6, 7, 8]}\n')
    (tmp_path / "plain.txt").write_text("forty two is the answer\n")
    rollouts = pa.table({"prompt_ids": [[11, 12]], "response_ids": [[13, 14, 15]]})
    pq.write_table(rollouts, tmp_path / "rollouts.parquet")
    return model, tokenizer, [str(tmp_path / name) for name in ("lines.jsonl", "plain.txt", "rollouts.parquet")]


def test_every_kind_of_source_is_found(sources, tmp_path, capsys) -> None:
    model, tokenizer, files = sources
    out = str(tmp_path / "stores" / "store.arrow")
    assert main(["datastore", "build", out, "--tokenizer", str(model), *files]) == 0
    assert "of 4 documents" in capsys.readouterr().out
    assert main(["datastore", "show", out]) == 0
    assert f"vocabulary {len(tokenizer)}" in capsys.readouterr().out
    store = Datastore.open(out, len(tokenizer), tokenizer_fingerprint(model))
    for before, after in (([5, 6], [7, 8]), ([12, 13], [14, 15])):
        assert store.retrieve(np.array(before), 8).tokens.tolist() == after
    for text in ("seven apples", "forty two"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert store.retrieve(np.array(ids[:4]), 3).tokens.tolist() == ids[4:7]


def test_bad_rows_are_named_and_counted(sources, tmp_path, capsys) -> None:
    model, _, files = sources
    bad = tmp_path / "bad.jsonl"
    rows = [{"text": "good"}, {"text": 7}, {"other": "x"}, {"token_ids": [1, -2]}, {"text": ""}]
    bad.write_text("\n".join([*map(json.dumps, rows), "no json"]))
    out = str(tmp_path / "store.arrow")
    command = ["datastore", "build", out, str(bad), files[0], "--tokenizer", str(model)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "Bad rows: 5" in error
    assert f'{bad}:2: "text" is a int, not a text' in error
    assert main([*command, "--max-bad-rows", "5"]) == 0
    assert "of 3 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--tokenizer", "/nowhere"), "/nowhere"),
        (("/nowhere/there.txt",), "cannot be read"),
        (("/nowhere/there.jsonl",), "does not exist"),
    ],
)
def test_what_is_missing_is_one_sentence(sources, tmp_path, capsys, change, message) -> None:
    model, _, files = sources
    command = ["datastore", "build", "--tokenizer", str(model), str(tmp_path / "s.arrow"), files[0], *change]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert main(["datastore", "show", files[1]]) == 2
