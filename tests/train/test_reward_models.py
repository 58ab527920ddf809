"""A model learns from pairs what people like, and judges by it."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest

from tests.train.tiny_run import settings
from thornback.cli.main import main
from thornback.contracts import Completion, ModelError, Prompt
from thornback.data import ArithmeticTask, ModelReward, RuleScorer, as_reward
from thornback.data.reward_model import batches_of, conversation
from thornback.train import Trainer


def pairs(count: int) -> list[dict[str, str]]:
    """Digits are liked, letters are not."""
    rng = random.Random(1)
    return [
        {
            "prompt": f"{rng.randrange(100)}?",
            "chosen": "".join(rng.choice("0123456789") for _ in range(rng.randrange(2, 20))),
            "rejected": "".join(rng.choice("abcdefghij") for _ in range(rng.randrange(2, 20))),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def trained(ray_cluster, tiny_model, tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("liked")
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs(200))))
    out = str(place / "model")
    options = ["--steps", "40", "--learning-rate", "1e-3", "--batch-size", "8", "--threads", "1"]
    assert main(["reward-model", str(tiny_model("qwen3")), out, str(place / "pairs.jsonl"), *options]) == 0
    rows = [json.loads(line) for line in (place / "model-metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]
    assert rows[-1]["accuracy"] == 1.0
    return out


def completions(*texts: str) -> list[Completion]:
    return [Completion(Prompt("k", ({"role": "user", "content": "7?"},)), text, 5, "stop") for text in texts]


def test_it_likes_what_it_was_told_to_like(trained):
    reward = as_reward("liked", "thornback.data:ModelReward", options={"model": trained, "num_threads": 1})
    scores = RuleScorer(ArithmeticTask(), [reward]).score(completions("12", "ab", "3456", "cdefgh"))["liked"]
    assert min(scores[0], scores[2]) > max(scores[1], scores[3])
    assert ((scores >= 0) & (scores <= 1)).all()


def test_scores_hang_on_no_batch(trained):
    """Nor on the padding that a batch brings."""
    rng = random.Random(2)
    texts = ["".join(rng.choice("0123456789abcdef") for _ in range(rng.randrange(1, 60))) for _ in range(24)]
    whole, single = (ModelReward(trained, batch_tokens=size, num_threads=1) for size in (4096, 1))
    together = whole.score_all(completions(*texts))
    np.testing.assert_allclose(together, single.score_all(completions(*texts)), atol=1e-5)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(whole)).score_all(completions(*texts)), together, atol=1e-6)
    assert len(set(np.round(together, 4))) > 12


def test_of_long_conversations_the_end_counts(trained):
    short = ModelReward(trained, max_length=12, num_threads=1)
    long = completions("x" * 300 + "123456789012")
    ids = conversation(short.tokenizer, long[0].prompt.messages, long[0].text)
    np.testing.assert_allclose(short.score_all(long), short.score_tokens([ids[-12:]]), atol=1e-6)


def test_batches():
    rows = batches_of([5, 1, 9, 2, 2], 6)
    assert [batch.tolist() for batch in rows] == [[1, 3, 4], [0], [2]]
    assert batches_of([], 6) == []


def test_what_is_no_classifier_is_refused(trained, tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"is no classifier: it has no .*score"):
        ModelReward(str(tiny_model("qwen3"))).score_all(completions("1"))
    with pytest.raises(ModelError, match="there is no label 3"):
        ModelReward(trained, label=3).score_all(completions("1"))


def test_a_run_does_not_load_it_to_see_whether_it_is_one(trained, tiny_model, tmp_path):
    def trainer(model):
        reward = {"function": "thornback.data:ModelReward", "options": {"model": model}}
        return Trainer(settings(tiny_model("qwen3"), tmp_path, rewards={"liked": reward}))

    (reward,) = trainer(trained).problem.rewards
    assert "model" not in vars(reward.thing)
    with pytest.raises(ModelError, match="is no classifier; train one"):
        trainer(str(tiny_model("qwen3")))
    assert Trainer(settings(tiny_model("qwen3"), tmp_path), reward={"liked": reward.thing}).problem.names == ("liked",)


def test_bad_settings_and_pairs_are_told(tiny_model, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a"}))
    assert main(["reward-model", str(tiny_model("qwen3")), str(tmp_path / "m"), str(tmp_path), "--steps", "0"]) == 2
    assert "--steps is 0" in capsys.readouterr().err
