"""Judging: rollouts become text, and the table says what the batch does not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.actors.batches import SHARD, rollouts
from thornback.actors import RewardTable, anchors_of
from thornback.actors.reward_model import RewardModelCore
from thornback.contracts import Prompt


class Scorer:
    """Rewards that say which completion they saw."""

    reward_names = ("length", "letters")
    failures = {"letters are hard": (1, "c")}  # noqa: RUF012

    def score(self, completions):
        self.seen = completions
        letters = [np.nan if c.prompt.key == "b" else float(sum(x.isalpha() for x in c.text)) for c in completions]
        return {
            "length": np.array([c.num_tokens for c in completions], np.float32),
            "letters": np.array(letters, np.float32),
            "correct": np.array([c.num_tokens % 2 for c in completions], np.float32),
        }


@pytest.fixture(scope="module")
def scored(tiny_model):
    model = tiny_model("qwen3")
    judge = RewardModelCore(Scorer, str(model))
    judge.setup()
    batch = rollouts(model)
    prompts = tuple(Prompt(key, ()) for key in SHARD.keys)
    return judge, batch, judge.score(batch, prompts, with_texts=True)


def test_every_rollout_meets_its_prompt(scored):
    judge, batch, table = scored
    assert [c.prompt.key for c in judge.scorer.seen] == batch.prompt_keys.tolist()
    assert table.lengths.tolist() == batch.response_lengths.tolist() == table.rewards["length"].tolist()
    assert table.truncated.tolist() == [c.finish_reason == "length" for c in judge.scorer.seen]
    assert np.isnan(table.rewards["letters"]).tolist() == (batch.prompt_keys == "b").tolist()


def test_text_is_the_tokens_less_the_end(scored):
    judge, batch, table = scored
    for i, text in enumerate(table.texts):
        assert text == judge.tokenizer.decode(batch.response(i).tolist(), skip_special_tokens=True)
        assert "<|im_end|>" not in text


def test_tables_join(scored):
    _, _, table = scored
    joined = RewardTable.concat([table, table])
    assert joined.rewards["length"].tolist() == table.rewards["length"].tolist() * 2
    assert joined.texts == table.texts * 2
    assert joined.failures == {"letters are hard": (2, "c")}


def test_anchors_leave_out_what_does_not_apply():
    nan = np.nan
    table = RewardTable(
        rewards={"r": np.array([1, nan, 0, nan, nan, nan], np.float32)},
        correct=np.array([1, 1, 0, 0, 0, 0], np.float32),
        lengths=np.ones(6, np.int32),
        truncated=np.zeros(6, bool),
        num_calls=np.zeros(6, np.int32),
        seconds=0.0,
    )
    first, second = anchors_of(["a", "b"], table, 3)
    assert first.rewards["r"] == 0.5
    assert first.accuracy == pytest.approx(2 / 3)
    assert np.isnan(second.rewards["r"])
    assert second.accuracy == 0.0
