"""How much is guessed: more where it is right, less where passes are dear, nothing where nothing is won."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thornback.algorithms import Agreement, Belief, best_size

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
    agreement = Agreement()
    start = agreement.rate
    for _ in range(20):
        agreement.learn(0, 1.0)
    assert agreement.rate < 0.3
    assert agreement.doubt > 2
    for _ in range(40):
        agreement.forget()
    assert agreement.rate > 0.85 * start
    for _ in range(20):
        agreement.learn(5, 0.0)
    assert agreement.rate > 0.9
    assert agreement.doubt < 0.5 < Agreement().doubt == 1


def test_promises_that_are_not_kept_are_not_believed() -> None:
    belief = Belief()
    assert belief.factor == 1
    for _ in range(20):
        belief.learn(1, 4.0)
    assert 0.2 < belief.factor < 0.4
    for _ in range(40):
        belief.learn(4, 4.0)
    assert belief.factor > 0.95
