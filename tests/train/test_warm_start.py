"""The warm start through Ray Train: it learns, is reproducible, and workers share the work without changing it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from thornback.contracts import DataError
from thornback.data import ArithmeticTask, character_tokenizer, make_demonstrations
from thornback.engine import load_model
from thornback.train.sections import WarmStartSection
from thornback.train.warm_start import Example, tokenized, warm_start


def weights(directory) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in load_model(directory).parameters()])


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return tokenized(character_tokenizer(), make_demonstrations(ArithmeticTask(), 200))


def test_examples_end_and_know_where_the_answer_starts(examples) -> None:
    tokenizer = character_tokenizer()
    demonstration = make_demonstrations(ArithmeticTask(), 1)[0]
    example = tokenized(tokenizer, [demonstration])[0]
    assert tokenizer.decode(example.token_ids[example.start : -1]) == demonstration.completion
    assert example.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.token_ids[: example.start]).endswith("assistant\n")


def test_it_learns_the_same_each_time_and_on_any_number_of_workers(tiny_model, examples, tmp_path, ray_cluster) -> None:
    def run(name: str, workers: int) -> dict[str, float]:
        section = WarmStartSection(steps=40, batch_size=16, learning_rate=1e-2, warmup_steps=5, num_workers=workers)
        log = tmp_path / f"{name}.jsonl"
        metrics = warm_start(
            tiny_model("qwen3"), examples, tmp_path / name, section, seed=3, num_threads=1, metrics_path=log
        )
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        assert [row["step"] for row in rows] == [20, 40]
        assert rows[-1]["loss"] == metrics["loss"]
        return metrics

    first = run("first", 1)
    assert first["loss"] < 2.0  # from log 128 = 4.9
    run("second", 1)
    np.testing.assert_array_equal(weights(tmp_path / "first"), weights(tmp_path / "second"))
    run("pair", 2)
    np.testing.assert_allclose(weights(tmp_path / "first"), weights(tmp_path / "pair"), atol=2e-2)
    assert character_tokenizer().get_vocab() == _tokenizer(tmp_path / "first").get_vocab()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".jsonl")) == ["first", "pair", "second"]


def _tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_no_demonstrations_is_an_error_before_anything_starts(tiny_model, tmp_path) -> None:
    with pytest.raises(DataError, match="no demonstrations"):
        warm_start(tiny_model("qwen3"), [], tmp_path / "x", WarmStartSection())
