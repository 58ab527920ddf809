"""What passes are believed to cost: as measured at first, then as they were seen to take."""

from __future__ import annotations

import time

import numpy as np

from thornback.engine.pass_costs import PassCosts

COSTS = ((0, 1e-3), (1, 2e-3), (8, 3e-3), (16, 5e-3), (64, 15e-3))


def measured() -> PassCosts:
    return PassCosts.measure(lambda n: time.sleep(1e-4 * n), max_tokens=16)


def test_measured_costs_never_fall() -> None:
    sizes, seconds = zip(*measured().listed[1:], strict=True)
    assert sizes[0] == 1
    assert sizes[-1] == 16
    assert list(seconds) == sorted(seconds)


def test_given_costs_stay_whatever_passes_take() -> None:
    costs = PassCosts(COSTS)
    before = costs.of(2)
    costs.observe(2, 8, 1.0)
    np.testing.assert_array_equal(costs.of(2), before)
    assert costs.listed == COSTS


def test_passes_that_take_longer_than_measured_are_believed_to() -> None:
    costs = measured()
    sizes, before = costs.sizes, costs.of(1)
    for _ in range(100):
        costs.observe(1, 16, 2 * before[sizes == 16][0])
        costs.observe(1, 1, before[0])
    after = costs.of(1)
    np.testing.assert_allclose(after[[0, -1]], [before[0], 2 * before[-1]], rtol=0.03)
    assert (np.diff(after) >= 0).all()
    np.testing.assert_array_equal(costs.of(4), before)  # other loads have not been seen


def test_a_size_that_seemed_dear_is_tried_again() -> None:
    costs = measured()
    before = costs.of(1)
    for _ in range(50):
        costs.observe(1, 16, 3 * before[costs.sizes == 16][0])
    dear = costs.of(1)[costs.sizes == 16][0]
    for _ in range(2000):
        costs.observe(1, 1, before[0])
    assert costs.of(1)[costs.sizes == 16][0] < 1.1 * before[costs.sizes == 16][0] < dear / 2


def test_steps_that_do_not_guess_are_told_apart() -> None:
    costs = PassCosts(((-1, 1e-3), (-8, 4.5e-3), *COSTS))
    np.testing.assert_allclose([costs.plain(n) for n in (1, 3, 8, 16)], [1e-3, 2e-3, 4.5e-3, 6.5e-3])
    np.testing.assert_allclose([costs.guessed(2, 8), costs.guessed(1, 12)], [5e-3, 5e-3])
    assert costs.listed == ((-1, 1e-3), (-8, 4.5e-3), *COSTS)
    assert PassCosts(COSTS).plain(3) == 0  # not known


def test_one_pass_that_was_held_up_changes_little() -> None:
    costs = measured()
    before = costs.of(1)
    for _ in range(20):
        costs.observe(1, 8, before[costs.sizes == 8][0])
    costs.observe(1, 8, 60.0)
    assert costs.of(1)[costs.sizes == 8][0] < 1.5 * before[costs.sizes == 8][0]
