"""The learner: the same update however it is cut, state that comes back bit for bit, weights as one buffer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.actors.batches import SAMPLING, SHARD, advantages, learner, rollouts, weights_of, worker
from thornback.actors.specs import OptimizerSpec
from thornback.contracts import CACHED_VERSION, DataError, ModelError, RolloutBatch
from thornback.engine import sequence_logprobs


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def batch(model):
    return rollouts(model)


def test_trainer_and_engine_agree_on_fresh_rollouts(model, batch):
    report = learner(model).update(0, advantages(batch), batch)
    assert report.metrics["mismatch/mean_abs"] < 1e-5
    assert report.metrics["mismatch/max_abs"] < 1e-4
    assert report.metrics["mismatch/weight_mean"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_micro_batches_change_nothing(model, batch, aggregation):
    found = []
    for budget in (10**6, 150, 1):
        core = learner(model, tokens_per_microbatch=budget, loss={"aggregation": aggregation})
        report = core.update(0, advantages(batch), batch)
        found.append((weights_of(core), report.metrics))
    for weights, metrics in found[1:]:
        np.testing.assert_allclose(weights, found[0][0], atol=2e-5)  # AdamW's first step is lr = 1e-3 everywhere
        assert metrics == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)
    assert np.abs(found[0][0] - weights_of(learner(model))).max() > 5e-4  # and something was learned


def test_the_order_of_rollouts_changes_nothing(model, batch):
    """They stand beside others then, and come in other packs."""
    order = np.random.default_rng(1).permutation(len(batch))
    shuffled = RolloutBatch.from_arrow(batch.to_arrow().take(order))
    one, other = (learner(model, tokens_per_microbatch=150) for _ in range(2))
    reports = [one.update(0, advantages(batch), batch), other.update(0, advantages(batch)[order], shuffled)]
    assert reports[1].metrics == pytest.approx(reports[0].metrics, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(weights_of(one), weights_of(other), atol=2e-5)


def test_rollouts_without_advantage_change_nothing_but_the_denominators(model, batch):
    """They are not computed; the update is the same as if they were, which a KL of tiny weight makes them."""
    values = advantages(batch)
    skipping, computing = learner(model), learner(model, kl_weight=1e-12)
    report = skipping.update(0, values, batch)
    assert report.num_trained == int((values != 0).sum()) < len(batch)
    assert computing.update(0, values, batch).num_trained == len(batch)
    np.testing.assert_allclose(weights_of(skipping), weights_of(computing), atol=2e-6)


def test_nothing_to_learn_moves_nothing(model, batch):
    core = learner(model)
    core.update(0, advantages(batch), batch)
    before = weights_of(core)
    report = core.update(1, np.zeros(len(batch)), batch)
    assert (report.num_steps, report.metrics) == (0, {})
    np.testing.assert_array_equal(weights_of(core), before)


def test_several_updates_measure_their_ratio_against_the_policy_of_the_rollouts(model, batch):
    core = learner(model, epochs_per_batch=2, updates_per_epoch=2, optimizer={"learning_rate": 3e-3})
    report = core.update(0, advantages(batch), batch)
    assert report.num_steps == 4
    assert report.metrics["clip_fraction"] > 0  # the later updates see ratios that moved
    assert report.metrics["mismatch/mean_abs"] < 1e-5  # measured where the policy is still that of the rollouts


def test_kl_to_the_start_is_zero_at_first_and_then_grows(model, batch):
    core = learner(model, kl_weight=0.1)
    first = core.update(0, advantages(batch), batch).metrics["kl"]
    second = core.update(1, advantages(batch), batch).metrics["kl"]
    assert abs(first) < 1e-8
    assert second > 1e-6


def test_a_cached_trajectory_is_measured_against_the_model_that_wrote_it(model, batch):
    cached, right = batch.response(3), batch.trajectory(3)
    foreign = replace(right, logprobs=right.logprobs - 1.5, versions=np.full_like(right.versions, CACHED_VERSION))
    trajectories = (foreign, None, None, None)
    mixed, _ = worker(model).generate(replace(SHARD, trajectories=trajectories), SAMPLING, 0)
    assert (mixed.response(3, "versions") == CACHED_VERSION).all()
    np.testing.assert_array_equal(mixed.response(3), cached)
    for other in (0, 1, 2, 4, 15):
        np.testing.assert_array_equal(mixed.response(other), batch.response(other))
    values = np.zeros(len(mixed))
    values[3] = 1.0
    report = learner(model).update(0, values, mixed)
    assert report.metrics["clip_fraction"] == 1.0  # pi / pi_gt = e^1.5 is above every bound, A > 0
    assert report.metrics["mismatch/max_abs"] == 0.0
    assert report.metrics["grad_norm"] == 0.0


def test_state_comes_back_bit_for_bit(model, batch, tmp_path):
    core, values = learner(model), advantages(batch)
    core.update(0, values, batch)
    core.save(str(tmp_path))
    saved = weights_of(core)
    core.update(1, values, batch)
    core.update(2, values, batch)
    other = learner(model)
    other.restore(str(tmp_path))
    np.testing.assert_array_equal(weights_of(other), saved)
    other.update(1, values, batch)
    other.update(2, values, batch)
    np.testing.assert_array_equal(weights_of(other), weights_of(core))


def test_a_checkpoint_of_another_kind_of_learner_is_refused(model, tmp_path):
    learner(model).save(str(tmp_path))
    with pytest.raises(DataError, match="keep the settings"):
        learner(model, lora=(4, 8.0, "all-linear")).restore(str(tmp_path))


def test_parameters_are_views_of_the_buffer_that_is_published(model, batch):
    core = learner(model)
    buffer, index = core.weights()
    start, end = buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes
    parameters = dict(core.rank.policy.model.named_parameters())
    assert {spec.name for spec in index} == set(parameters)
    assert all(start <= p.data_ptr() < end for p in parameters.values())
    before = buffer.copy()
    core.update(0, advantages(batch), batch)
    assert core.weights()[0] is not before
    assert (core.weights()[0] != before).any()
    assert core.weights()[0].ctypes.data == start


def test_lora_trains_adapters_and_publishes_merged_weights(model, batch):
    core = learner(model, lora=(4, 8.0, "all-linear"), kl_weight=0.01)
    base = weights_of(core)
    np.testing.assert_array_equal(base, weights_of(learner(model)))  # adapters begin as nothing
    assert all("lora" in name for name in core.rank.policy.trained)
    values = advantages(batch)
    assert abs(core.update(0, values, batch).metrics["kl"]) < 1e-8
    assert core.update(1, values, batch).metrics["kl"] > 0  # the reference is the model without adapters
    buffer, index = core.weights()
    assert np.abs(buffer.view(np.float32) - base).max() > 1e-5
    engine = worker(model)
    engine.load_weights(buffer, index, 2)
    fresh, _ = engine.generate(SHARD, SAMPLING, 2)
    assert core.update(2, values, fresh).metrics["mismatch/max_abs"] < 1e-4  # what was published is what is trained


def test_gradients_that_are_not_finite_move_nothing(model, batch):
    core = learner(model)
    before = weights_of(core)
    values = advantages(batch)
    values[1] = np.inf
    report = core.update(0, values, batch)
    assert (report.num_steps, report.num_skipped) == (1, 1)
    np.testing.assert_array_equal(weights_of(core), before)


def test_gradient_checkpointing_changes_nothing(model, batch):
    plain, saving = learner(model), learner(model)
    saving.spec = replace(saving.spec, policy=replace(saving.spec.policy, gradient_checkpointing=True))
    saving.setup()
    for core in (plain, saving):
        core.update(0, advantages(batch), batch)
    np.testing.assert_allclose(weights_of(saving), weights_of(plain), atol=2e-6)


def test_the_exported_model_is_the_trained_one(model, batch, tmp_path):
    core = learner(model, lora=(4, 8.0, "all-linear"))
    core.update(0, advantages(batch), batch)
    core.export(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = np.concatenate([batch.prompt(0), batch.response(0)])
    with torch.no_grad():
        ours = sequence_logprobs(core.rank.policy.model, [ids], [1])[0]
        theirs = loaded(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].log_softmax(-1)
    theirs = theirs.gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(AutoTokenizer.from_pretrained(model))


def test_lora_on_modules_that_are_not_there_is_one_sentence(model):
    with pytest.raises(ModelError, match="LoRA does not fit this model"):
        learner(model, lora=(4, 8.0, ("no_such_module",)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1.0, 1.0, 1.0, 1.0]), ("linear", [0.5, 1.0, 1.0, 0.7, 0.4]), ("cosine", [0.5, 1, 1, 0.7, 0.4])],
)
def test_learning_rate_is_a_function_of_the_step(schedule, expected):
    share = 0.4 if schedule != "constant" else 0.0
    spec = OptimizerSpec(
        learning_rate=1.0, schedule=schedule, final_learning_rate_share=share, warmup_steps=2, total_steps=4
    )
    rates = [spec.learning_rate_at(step) for step in (0, 1, 2, 3, 9)]
    if schedule == "constant":
        expected = [0.5, 1.0, 1.0, 1.0, 1.0]
    assert rates == pytest.approx(expected)
