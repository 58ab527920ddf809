"""How much is guessed: more where it is right, less where passes are dear, nothing where nothing is won."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thornback.algorithms import best_size, record_size, rests
from thornback.algorithms.speculation import belief, doubt, forget, learn, learn_belief, learn_rest, rate

SIZES = np.array([1, 8, 64, 256])


def test_a_guess_that_costs_nothing_is_always_made() -> None:
    assert best_size(np.array([0.5, 0.1, 0.01]), 1, 1, np.ones(4), SIZES) == 3


def test_a_full_batch_guesses_nothing_unless_it_is_nearly_sure() -> None:
    seconds = SIZES * 1.0  # every token costs the same
    assert best_size(np.full(10, 0.9), 64, 64, seconds, SIZES) == 0
    assert best_size(np.full(10, 0.9), 1, 1, np.array([1.0, 1.1, 2.0, 6.0]), SIZES) == 10


@given(
    st.lists(st.floats(0, 1), max_size=20),
    st.integers(1, 64),
    st.lists(st.floats(0.01, 2), min_size=4, max_size=4),
)
def test_no_other_size_gives_more(likely, num, steps) -> None:
    likely, seconds = np.sort(likely)[::-1], np.cumsum(steps)
    best = best_size(likely, num, num, seconds, SIZES)
    rates = [(num + likely[:k].sum()) / np.interp(num + k, SIZES, seconds) for k in range(len(likely) + 1)]
    assert rates[best] >= max(rates) - 1e-9


def test_agreement_follows_what_happens_and_recovers() -> None:
    record = np.zeros(record_size(2))
    start = rate(record, 1)
    assert doubt(record, 1) == 1
    for _ in range(20):
        learn(record, 1, 0, 1.0)
    assert rate(record, 1) < 0.3
    assert doubt(record, 1) > 2
    assert rate(record, 0) == start
    for _ in range(40):
        forget(record, 1)
    assert rate(record, 1) > 0.85 * start
    for _ in range(20):
        learn(record, 1, 5, 0.0)
    assert rate(record, 1) > 0.9
    assert doubt(record, 1) < 0.5


def test_promises_that_are_not_kept_are_not_believed() -> None:
    record = np.zeros(record_size(1))
    assert belief(record) == 1
    for _ in range(20):
        learn_belief(record, 1, 4.0)
    assert 0.2 < belief(record) < 0.4
    for _ in range(40):
        learn_belief(record, 4, 4.0)
    assert belief(record) > 0.95


def test_who_is_never_right_rests_ever_longer_and_who_is_right_does_not() -> None:
    records, slots = np.zeros((2, record_size(1))), np.array([0, -1, 1])
    tries = []
    for now in range(300):
        resting = rests(records, slots)
        assert not resting[1:].any()  # one that has no record yet, and one that is right now and then
        if not resting[0]:
            tries.append(now)
            learn_rest(records[0], 0)
        learn_rest(records[1], now % 3 // 2)
    assert tries[:6] == [0, 1, 2, 5, 10, 19]  # the first misses are nothing
    assert np.diff(tries).max() == 65
    learn_rest(records[0], 1)
    assert not rests(records, slots).any()
