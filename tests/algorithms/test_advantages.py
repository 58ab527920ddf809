"""Every property of papers.md, sections 1 and 2, to float precision; and what happens at the edges."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from thornback.algorithms import ANCHORED, ESTIMATORS, GroupRewards
from thornback.algorithms.advantages.dvao import spread_weights

NAMES = tuple("abcdefgh")
settings.register_profile("mathematics", max_examples=100, deadline=None)
settings.load_profile("mathematics")


def one_group(values, weights=None, anchors=None) -> GroupRewards:
    values = np.asarray(values, float)
    k = values.shape[1]
    weights = np.ones(k) if weights is None else np.asarray(weights, float)
    return GroupRewards(values, NAMES[:k], weights, np.array([0, len(values)]), anchors)


@st.composite
def groups(draw, min_size: int = 2, min_rewards: int = 1) -> GroupRewards:
    """One to four prompts, each with rollouts judged by a few rewards, binary or graded."""
    k = draw(st.integers(min_rewards, 4))
    sizes = draw(st.lists(st.integers(min_size, 9), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.random((sum(sizes), k))
    if draw(st.booleans()):
        values = values.round()
    weights = rng.random(k) + 0.05
    return GroupRewards(
        values, NAMES[:k], weights, np.concatenate([[0], np.cumsum(sizes)]), rng.random((len(sizes), k))
    )


def has_spread(g: GroupRewards) -> np.ndarray:
    """bool `[Q]`: groups whose combined reward varies."""
    combined = g.centred @ g.weights
    return np.sqrt(g.sum_groups(combined**2)) > 1e-4


# Section 1: DVAO


@given(groups())
def test_p1_dvao_is_a_shrunk_reward_combination(g: GroupRewards) -> None:
    assume(has_spread(g).all())
    sizes = np.diff(g.group_offsets)
    combined = g.values @ g.weights
    mean = g.sum_groups(combined) / sizes
    std = np.sqrt(g.sum_groups((combined - mean[g.group_of]) ** 2) / sizes)
    c = std / (g.std @ g.weights)
    assert ((c >= 0) & (c <= 1 + 1e-12)).all()
    a_dvao, a_rc = ESTIMATORS["dvao"](g).values, ESTIMATORS["reward_combination"](g).values
    np.testing.assert_allclose(a_dvao, c[g.group_of] * a_rc, atol=1e-10)
    assert (np.abs(a_dvao) <= np.abs(a_rc) + 1e-10).all()
    np.testing.assert_allclose(g.sum_groups(a_dvao**2) / sizes, c**2, atol=1e-10)
    np.testing.assert_allclose(g.sum_groups(a_rc**2) / sizes, 1, atol=1e-8)


def shrinkage(values, weights) -> float:
    g = one_group(values, weights)
    return float(np.sqrt((ESTIMATORS["dvao"](g).values ** 2).mean()))


def test_p1_special_cases() -> None:
    x = np.array([0.0, 0.0, 1.0, 1.0])
    y = np.array([0.0, 1.0, 0.0, 1.0])  # uncorrelated with x, of equal spread
    assert shrinkage(np.stack([x, 1 - x], 1), [1, 1]) == pytest.approx(0, abs=1e-12)
    assert shrinkage(np.stack([x, y], 1), [1, 1]) == pytest.approx(1 / np.sqrt(2))
    assert shrinkage(np.stack([x, 0.3 * x + 0.1], 1), [1, 4]) == pytest.approx(1)
    w = np.array([0.3, 0.7])
    s = np.array([0.5, 0.2])
    opposed = np.stack([x, 0.4 * (1 - x)], 1)
    assert shrinkage(opposed, w) == pytest.approx(abs(w[0] * s[0] - w[1] * s[1]) / (w @ s))


@given(groups())
def test_p2_no_advantage_exceeds_the_root_of_the_group(g: GroupRewards) -> None:
    bound = np.sqrt(np.diff(g.group_offsets) - 1)[g.group_of]
    for name in ("reward_combination", "advantage_combination", "dvao"):
        assert (np.abs(ESTIMATORS[name](g).values) <= bound + 1e-9).all(), name


@given(groups(min_size=3), st.integers(0, 10**6))
def test_p3_the_cross_term_by_finite_differences(g: GroupRewards, pick: int) -> None:
    g = one_group(g.values[: g.group_offsets[1]], g.weights)
    size, k = len(g.values), len(g.names)
    assume((g.std > 0.05).all())
    j, reward = pick % size, pick // size % k
    step = 1e-6

    def advantage(delta: float) -> float:
        values = g.values.copy()
        values[j, reward] += delta
        return ESTIMATORS["dvao"](one_group(values, g.weights)).values[j]

    measured = (advantage(step) - advantage(-step)) / (2 * step)
    a = ESTIMATORS["dvao"](g).values[j]
    own = (g.centred / g.std[0])[j, reward]
    weight = spread_weights(g, 1e-6)[0, reward]
    exact = weight / g.std[0, reward] * (1 - 1 / size - a * own / size)
    assert measured == pytest.approx(exact, abs=1e-4)


def test_variance_in_place_of_the_spread_loses_both_properties() -> None:
    rng = np.random.default_rng(0)
    worse = unproportional = False
    for _ in range(200):
        g = one_group(rng.random((5, 2)), rng.random(2) + 0.1)
        weights = g.weights * g.std[0] ** 2
        by_variance = (g.centred / g.std[0]) @ (weights / weights.sum())
        a_rc = ESTIMATORS["reward_combination"](g).values
        worse |= bool((np.abs(by_variance) > np.abs(a_rc) + 1e-9).any())
        unproportional |= np.ptp(by_variance / a_rc) > 1e-6
    assert worse
    assert unproportional


def test_advantage_combination_can_have_the_smaller_mean_square() -> None:
    rng = np.random.default_rng(0)
    cases = [one_group(rng.random((4, 2)), rng.random(2) + 0.1) for _ in range(200)]
    smaller = [
        (ESTIMATORS["advantage_combination"](g).values ** 2).mean() < (ESTIMATORS["dvao"](g).values ** 2).mean()
        for g in cases
    ]
    assert any(smaller)
    assert not all(smaller)


@given(groups())
def test_dvao_weights_are_a_distribution_by_spread(g: GroupRewards) -> None:
    weights = ESTIMATORS["dvao"](g).effective_weights
    live = (g.std @ g.weights) >= 1e-6
    np.testing.assert_allclose(weights[live].sum(1), 1)
    assert (weights[~live] == 0).all()
    np.testing.assert_allclose((weights * (g.std @ g.weights)[:, None])[live], (g.weights * g.std)[live], atol=1e-12)


@given(groups(min_rewards=2), st.floats(0.0, 0.3), st.floats(0.4, 1.0))
def test_floor_and_cap_bound_the_weights(g: GroupRewards, floor: float, cap: float) -> None:
    got = ESTIMATORS["dvao"](g, weight_floor=floor, weight_cap=cap)
    live = (g.std @ g.weights) >= 1e-6
    raw = spread_weights(g, 1e-6)
    bounded = np.clip(raw, floor, cap)
    np.testing.assert_allclose(got.effective_weights[live], (bounded / bounded.sum(1, keepdims=True))[live])
    assert (got.values[~live[g.group_of]] == 0).all()
    wide = ESTIMATORS["dvao"](g, weight_floor=0.0, weight_cap=1.0).values
    np.testing.assert_allclose(wide, ESTIMATORS["dvao"](g).values, atol=1e-9)


@given(groups())
def test_gdpo_is_advantage_combination_whitened_over_the_batch(g: GroupRewards) -> None:
    a = ESTIMATORS["gdpo"](g).values
    ac = ESTIMATORS["advantage_combination"](g).values
    assume(ac.std() > 1e-3)
    assert a.mean() == pytest.approx(0, abs=1e-9)
    assert a.std() == pytest.approx(1)
    np.testing.assert_allclose(a * ac.std() + ac.mean(), ac, atol=1e-9)


# Section 2: PVPO, and anchored DVAO


@given(groups())
def test_pvpo_compares_with_the_anchor_only(g: GroupRewards) -> None:
    a = ESTIMATORS["pvpo"](g).values
    for j in range(len(a)):
        expected = sum(w * (r - v) for w, r, v in zip(g.weights, g.values[j], g.anchors[g.group_of[j]], strict=True))
        assert a[j] == pytest.approx(expected, abs=1e-12)


@given(groups())
def test_anchored_dvao_is_dvao_where_the_anchor_is_the_mean(g: GroupRewards) -> None:
    anchored = GroupRewards(g.values, g.names, g.weights, g.group_offsets, g.mean)
    got, wanted = ESTIMATORS["anchored_dvao"](anchored), ESTIMATORS["dvao"](g)
    np.testing.assert_allclose(got.values, wanted.values, atol=1e-6)
    np.testing.assert_allclose(got.effective_weights, wanted.effective_weights)


@given(groups())
def test_anchored_dvao_never_explodes(g: GroupRewards) -> None:
    tiny = GroupRewards(1e-4 * g.values, g.names, g.weights, g.group_offsets, np.ones_like(g.anchors))
    for case in (g, tiny):
        a = ESTIMATORS["anchored_dvao"](case).values
        assert (np.abs(a) <= np.sqrt(np.diff(g.group_offsets))[g.group_of] + 1e-9).all()


def test_anchored_dvao_moves_with_the_anchor_and_orders_like_dvao() -> None:
    values = [[0.0], [0.0], [1.0], [1.0]]
    low, high = (ESTIMATORS["anchored_dvao"](one_group(values, anchors=[[v]])).values for v in (0.1, 0.9))
    assert (low > high).all()
    assert (np.argsort(low, kind="stable") == np.argsort(high, kind="stable")).all()
    no_spread = one_group([[1.0], [1.0]], anchors=[[0.2]])
    assert (ESTIMATORS["anchored_dvao"](no_spread).values == 0).all()


def test_an_anchor_that_never_applied_is_the_groups_mean() -> None:
    values = [[0.0, 1.0], [1.0, 0.2], [1.0, 0.4]]
    got = ESTIMATORS["anchored_dvao"](one_group(values, anchors=[[np.nan, np.nan]])).values
    np.testing.assert_allclose(got, ESTIMATORS["dvao"](one_group(values)).values, atol=1e-9)


# One reward


@given(groups())
def test_single_reward_estimators(g: GroupRewards) -> None:
    g = GroupRewards(g.values[:, :1], NAMES[:1], np.ones(1), g.group_offsets, g.anchors[:, :1])
    for q in range(len(g.group_offsets) - 1):
        rows = slice(g.group_offsets[q], g.group_offsets[q + 1])
        r = g.values[rows, 0]
        np.testing.assert_allclose(ESTIMATORS["dr_grpo"](g).values[rows], r - r.mean(), atol=1e-12)
        others = [r[j] - np.delete(r, j).mean() for j in range(len(r))]
        np.testing.assert_allclose(ESTIMATORS["rloo"](g).values[rows], others, atol=1e-12)
        if r.std() > 1e-3:
            for name in ("grpo", "reward_combination", "advantage_combination", "dvao"):
                np.testing.assert_allclose(ESTIMATORS[name](g).values[rows], (r - r.mean()) / r.std(), atol=1e-9)


def test_grpo_refuses_several_rewards() -> None:
    with pytest.raises(ValueError, match="grpo takes one reward, but there are 2"):
        ESTIMATORS["grpo"](one_group([[0, 1], [1, 0]]))


# Edges, for all of them


def all_estimators(one_reward: bool = False):
    return [name for name in ESTIMATORS if one_reward or name != "grpo"]


@given(groups())
def test_groups_do_not_see_each_other(g: GroupRewards) -> None:
    for name in all_estimators():
        if name == "gdpo":
            continue
        together = ESTIMATORS[name](g).values
        for q in range(len(g.group_offsets) - 1):
            rows = slice(g.group_offsets[q], g.group_offsets[q + 1])
            alone = one_group(g.values[rows], g.weights, g.anchors[q : q + 1])
            np.testing.assert_allclose(together[rows], ESTIMATORS[name](alone).values, atol=1e-12)


@given(groups(), st.randoms())
def test_rollouts_and_groups_in_another_order_have_the_same_advantages(g: GroupRewards, random) -> None:
    groups = [list(range(begin, end)) for begin, end in pairwise(g.group_offsets.tolist())]
    order = random.sample(range(len(groups)), len(groups))
    rows = [row for q in order for row in random.sample(groups[q], len(groups[q]))]
    offsets = np.cumsum([0, *(len(groups[q]) for q in order)])
    shuffled = GroupRewards(g.values[rows], g.names, g.weights, offsets, g.anchors[order])
    for name in all_estimators():
        np.testing.assert_allclose(ESTIMATORS[name](shuffled).values, ESTIMATORS[name](g).values[rows], atol=1e-9)


@pytest.mark.parametrize("name", all_estimators())
def test_equal_rewards_teach_nothing(name) -> None:
    anchors = np.array([[0.4, 0.4]])
    values = ESTIMATORS[name](one_group(np.full((4, 2), 0.4), anchors=anchors)).values
    np.testing.assert_allclose(values, 0, atol=1e-12)


@pytest.mark.parametrize("name", all_estimators())
def test_groups_of_one(name) -> None:
    single = one_group([[0.7, 0.1]], anchors=[[0.5, 0.5]])
    if name == "rloo":
        with pytest.raises(ValueError, match="at least 2"):
            ESTIMATORS[name](single)
        return
    value = ESTIMATORS[name](single).values
    assert value == pytest.approx([-0.1 if name == "pvpo" else 0.0])


@pytest.mark.parametrize("name", all_estimators())
def test_a_reward_without_spread_changes_no_sign(name) -> None:
    live = [[0.0], [1.0], [1.0]]
    with_dead = one_group([[0.0, 0.5], [1.0, 0.5], [1.0, 0.5]], anchors=[[0.5, 0.5]])
    got = ESTIMATORS[name](with_dead).values
    wanted = ESTIMATORS[name](one_group(live, anchors=[[0.5]])).values
    assert (np.sign(got) == np.sign(wanted)).all()
    if name in ("reward_combination", "dvao", "gdpo", "anchored_dvao"):
        np.testing.assert_allclose(got, wanted, atol=1e-9)


@pytest.mark.parametrize("name", all_estimators())
def test_a_reward_that_does_not_apply_leaves_the_term_out_not_the_group(name) -> None:
    values = np.array([[0.0, 0.2], [1.0, np.nan], [1.0, 0.8], [0.0, 0.6]])
    a = ESTIMATORS[name](one_group(values, anchors=[[0.5, 0.5]])).values
    assert np.isfinite(a).all()
    assert (a != 0).any()
    nowhere = np.column_stack([values[:, 0], np.full(4, np.nan)])
    a = ESTIMATORS[name](one_group(nowhere, anchors=[[0.5, np.nan]])).values
    alone = ESTIMATORS[name](one_group(values[:, :1], anchors=[[0.5]])).values
    assert (np.sign(a) == np.sign(alone)).all()


def test_dvao_with_a_missing_reward_by_hand() -> None:
    values = np.array([[0.0, 0.2], [1.0, np.nan], [1.0, 0.8]])
    w = np.array([0.5, 0.5])
    mu = np.array([2 / 3, 0.5])
    s = np.array([np.sqrt(2) / 3, 0.3])
    expected = [((values[j] - mu) * w)[~np.isnan(values[j])].sum() / (w @ s) for j in range(3)]
    np.testing.assert_allclose(ESTIMATORS["dvao"](one_group(values)).values, expected)


@pytest.mark.parametrize("name", sorted(ANCHORED))
def test_anchors_are_needed(name) -> None:
    with pytest.raises(ValueError, match=f"{name} needs anchors"):
        ESTIMATORS[name](one_group([[0.0], [1.0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((4, 3))}, "shape"),
        ({"values": np.zeros(4)}, "shape"),
        ({"values": np.array([[0, 0], [0, np.inf], [0, 0], [0, 0]])}, "reward b of rollout 1 is infinite"),
        ({"weights": np.array([1.0, -1.0])}, "weights"),
        ({"weights": np.zeros(2)}, "weights"),
        ({"weights": np.ones(3)}, "weights"),
        ({"group_offsets": np.array([0, 3])}, "offsets"),
        ({"group_offsets": np.array([0, 2, 2, 4])}, "group 1 is empty"),
        ({"anchors": np.zeros((2, 2))}, "anchors"),
    ],
)
def test_wrong_shapes_and_numbers_are_named(change, message) -> None:
    good = {
        "values": np.zeros((4, 2)), "names": ("a", "b"), "weights": np.ones(2),
        "group_offsets": np.array([0, 4]), "anchors": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        GroupRewards(**{**good, **change})


def test_what_is_logged() -> None:
    g = GroupRewards(
        np.array([[0.0, 0.3], [1.0, 0.3], [1.0, 0.3], [1.0, 0.3]]), ("a", "b"), np.ones(2), np.array([0, 2, 4])
    )
    metrics = ESTIMATORS["dvao"](g).metrics
    assert metrics["advantage/nonzero_groups"] == 0.5
    assert metrics["advantage/abs_max"] == pytest.approx(1)
    assert metrics["advantage/mean_square"] == pytest.approx(0.5)
    assert (metrics["weight/a"], metrics["weight/b"]) == (pytest.approx(0.5), 0)
