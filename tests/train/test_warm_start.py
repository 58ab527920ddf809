"""The warm start through Ray Train: it learns, is reproducible, and workers share the work without changing it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from thornback.contracts import ConfigError, DataError
from thornback.data import ArithmeticTask, character_tokenizer, load_task, make_demonstrations
from thornback.engine import load_model
from thornback.train.config import make_config
from thornback.train.sections import WarmStartSection
from thornback.train.warm_start import Example, supervise, tokenized, warm_start


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


def trained(tiny_model, examples, output, workers: int = 1) -> dict[str, float]:
    section = WarmStartSection(steps=40, batch_size=16, learning_rate=1e-2, warmup_steps=5, num_workers=workers)
    log = output.with_suffix(".jsonl")
    metrics = supervise(tiny_model("qwen3"), examples, output, section, seed=3, num_threads=1, metrics_path=log)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]
    assert rows[-1] == metrics
    return metrics


@pytest.mark.full
def test_it_learns_and_workers_share_the_work_without_changing_it(tiny_model, examples, tmp_path, ray_cluster) -> None:
    metrics = trained(tiny_model, examples, tmp_path / "one")
    assert metrics["loss"] < 2.0  # from log 128 = 4.9
    trained(tiny_model, examples, tmp_path / "pair", workers=2)
    np.testing.assert_allclose(weights(tmp_path / "one"), weights(tmp_path / "pair"), atol=2e-2)
    assert _tokenizer(tmp_path / "one").get_vocab() == character_tokenizer().get_vocab()
    assert {p.name for p in tmp_path.iterdir()} == {"one", "one.jsonl", "pair", "pair.jsonl"}


@pytest.mark.full
def test_the_same_seed_gives_the_same_weights(tiny_model, examples, tmp_path, ray_cluster) -> None:
    for name in ("first", "second"):
        trained(tiny_model, examples, tmp_path / name)
    np.testing.assert_array_equal(weights(tmp_path / "first"), weights(tmp_path / "second"))


def _tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_a_task_without_demonstrations_is_refused(tiny_model, tmp_path) -> None:
    (tmp_path / "sums.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    config = make_config(
        {"task": {"name": "math", "options": {"path": str(tmp_path / "sums.jsonl")}}, "warm_start": {}}
    )
    with pytest.raises(ConfigError, match="gives no demonstrations"):
        warm_start(config, load_task(config.task.name, config.task.options), tiny_model("qwen3"), tmp_path / "x")
    config = make_config({"warm_start": {"options": {"spoiled": 1}}})
    with pytest.raises(ConfigError, match="spoiled"):
        warm_start(config, load_task(config.task.name, config.task.options), tiny_model("qwen3"), tmp_path / "x")


def test_no_demonstrations_is_an_error_before_anything_starts(tiny_model, tmp_path) -> None:
    with pytest.raises(DataError, match="no demonstrations"):
        supervise(tiny_model("qwen3"), [], tmp_path / "x", WarmStartSection())
