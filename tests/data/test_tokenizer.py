"""Two models' tokenizers are told apart by what their ids mean."""

from __future__ import annotations

import json

import pytest

from thornback.contracts import DataError
from thornback.data import character_tokenizer, same_tokens


def test_tokenizers_are_the_same_however_they_are_written(tmp_path) -> None:
    for name, extra in (("one", ()), ("two", ()), ("other", ("more",))):
        character_tokenizer(extra).save_pretrained(tmp_path / name)
    path = tmp_path / "two" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert same_tokens(tmp_path / "one", tmp_path / "two")
    assert not same_tokens(tmp_path / "one", tmp_path / "other")
    path.write_text("{")
    with pytest.raises(DataError, match="two has no readable tokenizer"):
        same_tokens(tmp_path / "one", tmp_path / "two")
