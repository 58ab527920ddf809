"""From reward tables to advantages: ranges to [0, 1], constants of the estimator's section, anchors by prompt."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from thornback.actors import RewardTable
from thornback.algorithms import ANCHORED, ESTIMATORS
from thornback.algorithms.losses import LOSSES
from thornback.contracts import Anchor, ConfigError
from thornback.train.config import ANCHORED_ESTIMATORS, make_config
from thornback.train.crew import learner_spec_of
from thornback.train.objective import Objective, reward_metrics
from thornback.train.sections import AlgorithmSection

NAMES = ("right", "points")
WEIGHTS = np.array([0.75, 0.25])
RANGES = np.array([[0.0, 1.0], [-5.0, 15.0]])


def table(right, points):
    n = len(right)
    rewards = {"right": np.array(right, np.float32), "points": np.array(points, np.float32)}
    return RewardTable(
        rewards, rewards["right"], np.full(n, 7, np.int32), np.arange(n) % 2 == 0, np.zeros(n, np.int32), 0.0
    )


def objective(estimator, **constants):
    values = {"algorithm": {"estimator": estimator, "dvao": constants}, "anchors": {}, "rollout": {}}
    return Objective.of(make_config(values), NAMES, WEIGHTS, RANGES)


def test_the_configuration_names_every_estimator_and_loss():
    fields = AlgorithmSection.model_fields
    assert set(get_args(fields["estimator"].annotation)) == set(ESTIMATORS)
    assert set(get_args(fields["loss"].annotation)) == set(LOSSES)
    assert set(ANCHORED_ESTIMATORS) == ANCHORED


def test_rewards_are_scaled_by_their_ranges():
    """A reward in other units with its range is the same reward."""
    right, points = [1, 0, 1, 0], [15.0, -5.0, 5.0, 5.0]
    found = objective("dvao").advantages(table(right, points), 2, ("a", "b"), None).values
    unit = Objective(NAMES, WEIGHTS, np.array([[0.0, 1.0]] * 2), "dvao", {})
    expected = unit.advantages(table(right, [1.0, 0.0, 0.5, 0.5]), 2, ("a", "b"), None).values
    np.testing.assert_allclose(found, expected)
    assert found[0] == -found[1] == pytest.approx(1.0)


def test_pvpo_compares_with_the_anchors_of_its_prompts():
    anchors = {"a": Anchor("a", {"right": 0.25, "points": 5.0}, 0.25, 8), "b": Anchor("b", {"right": 1.0}, 1.0, 8)}
    found = objective("pvpo").advantages(table([1, 0, 1, 1], [5.0, 5.0, 5.0, 15.0]), 2, ("a", "b"), anchors).values
    np.testing.assert_allclose(found, [0.75 * 0.75, -0.25 * 0.75, 0.0, 0.0])  # b has no anchor of points


def test_constants_come_from_the_estimators_section():
    scores = table([1, 0], [5.0, 6.0])
    free, floored = (objective("dvao", **c).advantages(scores, 2, ("a",), None) for c in ({}, {"weight_floor": 0.4}))
    assert floored.effective_weights[0, 1] > 5 * free.effective_weights[0, 1]
    options = learner_spec_of(make_config({"algorithm": {"loss": "gspo"}}), "m").update.loss_options
    assert (options["loss"], options["clip_low"], options["clip_high"]) == ("gspo", 3e-4, 4e-4)


def test_an_estimator_that_does_not_fit_is_told_before_anything_starts():
    with pytest.raises(ConfigError, match=r"algorithm.estimator: grpo takes one reward, but there are 2"):
        objective("grpo")
    config = make_config({"algorithm": {"estimator": "rloo"}, "rollout": {"samples_per_prompt": 1}})
    with pytest.raises(ConfigError, match="at least 2 rollouts"):
        Objective.of(config, NAMES, WEIGHTS, RANGES)


def test_metrics_leave_out_what_does_not_apply():
    nan = float("nan")
    metrics = reward_metrics(table([1, 0, nan, 1], [nan] * 4))
    assert metrics["reward/right/mean"] == pytest.approx(2 / 3)
    assert "reward/points/mean" not in metrics
    assert (metrics["response_length"], metrics["truncated_fraction"]) == (7.0, 0.5)
