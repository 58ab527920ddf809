"""Pre-sampling: anchors are means of reference rollouts, the filter is PVPO's, a larger model's right answers stay."""

from __future__ import annotations

import pytest

from tests.train.tiny_run import REWARDS, Lucky, settings
from thornback.contracts import Anchor, ConfigError, DataError
from thornback.data import character_tokenizer, read_anchors, read_rollouts
from thornback.train import Trainer, build_model, presample
from thornback.train.config import make_config
from thornback.train.presampling import check_same_tokenizer, worth_training
from thornback.train.prompts import TokenizedPrompt

NUM_ROLLOUTS = 6
ANCHORS = {"num_rollouts": NUM_ROLLOUTS, "larger_model_rollouts": 48}


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    directory = tmp_path_factory.mktemp("larger")
    return build_model(directory, character_tokenizer(), hidden_size=96, num_hidden_layers=2, seed=5)


@pytest.fixture(scope="module")
def run(ray_cluster, tiny_model, larger, tmp_path_factory):
    """Two steps with anchors and a larger model: (directory, anchors)."""
    directory = tmp_path_factory.mktemp("anchored")
    values = settings(
        tiny_model("qwen3"),
        directory,
        run={"steps": 3, "save_rollouts": True},
        algorithm={"estimator": "pvpo"},
        anchors={**ANCHORS, "larger_model": str(larger)},
        evaluation={"every": 0},
        data={"prompts_per_step": 6},
    )
    Trainer(values, data=Lucky(), reward=REWARDS).train()
    return directory, read_anchors(str(directory / "anchors.parquet"))


def test_anchors_are_means_of_reference_rollouts(run):
    _, anchors = run
    assert [a.prompt_key for a in anchors.values()] == [f"train/{i}" for i in range(8)]
    for anchor in anchors.values():
        assert anchor.num_rollouts == NUM_ROLLOUTS
        assert anchor.accuracy * NUM_ROLLOUTS == pytest.approx(round(anchor.accuracy * NUM_ROLLOUTS), abs=1e-5)
        assert 0 < anchor.rewards["digits"] < 1
        assert 0 <= anchor.rewards["vowels"] <= 10
    assert len({anchor.rewards["digits"] for anchor in anchors.values()}) > 4


def test_right_answers_of_the_larger_model_train_in_place_of_a_sample(run):
    directory, anchors = run
    cached = {key: a for key, a in anchors.items() if a.trajectory is not None}
    unsolved = {key for key, a in anchors.items() if a.accuracy == 0}
    assert cached
    assert cached.keys() <= unsolved
    tokenizer = character_tokenizer()
    seen = 0
    for step in (1, 2, 3):
        batch = read_rollouts(str(directory / "rollouts" / f"step-{step:06d}.parquet"))
        for key in set(batch.prompt_keys.tolist()):
            rows = [i for i, k in enumerate(batch.prompt_keys) if k == key]
            foreign = [i for i in rows if (batch.response(i, "versions") < 0).any()]
            assert len(rows) == 4 * (len(rows) // 4)
            if key not in cached:
                assert not foreign
                continue
            seen += 1
            assert [batch.sample_index[i] for i in foreign] == [3] * (len(rows) // 4)  # the last of the group
            assert batch.response(foreign[0]).tolist() == cached[key].trajectory.token_ids.tolist()
            assert batch.response(foreign[0], "logprobs") == pytest.approx(cached[key].trajectory.logprobs)
            assert batch.correct[foreign[0]] == 1
            letter = Lucky.answers()[key]
            assert letter in tokenizer.decode(cached[key].trajectory.token_ids)
    assert seen


def test_the_filter_keeps_what_can_teach(run):
    _, anchors = run
    prompts = [TokenizedPrompt(p, (1,)) for p in Lucky().prompts("train")]

    def kept(**options):
        config = make_config({"anchors": options})
        return {p.prompt.key for p in worth_training(prompts, anchors, config)}

    solvable = {key for key, a in anchors.items() if 0 < a.accuracy < 1}
    cached = {key for key, a in anchors.items() if a.trajectory is not None}
    assert kept() == solvable | cached
    assert kept(drop_unsolved=False, drop_solved=False) == set(anchors)
    with pytest.raises(DataError, match="have no anchor"):
        worth_training(prompts, {}, make_config({"anchors": {}}))


def test_presampling_by_itself_and_from_a_file(ray_cluster, run, tiny_model, tmp_path, capsys):
    directory, anchors = run
    values = settings(tiny_model("qwen3"), tmp_path, anchors={"path": str(directory / "anchors.parquet")})
    values["task"] = {"name": "tests.train.tiny_run:Lucky", "options": {}}
    values["rewards"] = {name: {"function": f"tests.train.tiny_run:{name}"} for name in REWARDS}
    found = presample(make_config(values))
    assert found.keys() == anchors.keys()
    assert "8 prompts" in capsys.readouterr().out
    assert read_anchors(str(tmp_path / "anchors.parquet")).keys() == anchors.keys()


def test_a_larger_model_with_another_tokenizer_is_refused(tiny_model, tmp_path):
    other = build_model(tmp_path, character_tokenizer(["<extra>"]), hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ConfigError, match="does not share its tokenizer"):
        check_same_tokenizer(str(tiny_model("qwen3")), str(other))
    check_same_tokenizer(str(tiny_model("qwen3")), str(tiny_model("llama")))


def test_nothing_left_to_train_on_says_what_to_do():
    prompts = [TokenizedPrompt(p, (1,)) for p in Lucky().prompts("train")]
    solved = {p.prompt.key: Anchor(p.prompt.key, {}, 1.0, 2) for p in prompts}
    with pytest.raises(DataError, match="none is left to train on; take another task difficulty"):
        worth_training(prompts, solved, make_config({"anchors": {}}))
