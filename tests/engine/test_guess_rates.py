"""Guessing goes on where it wins, stops where it does not, and is tried again."""

from __future__ import annotations

import pytest

from thornback.engine.guess_rates import GuessRate, KnownRate


def ways(rate: GuessRate | KnownRate, steps: int, tokens: float, *known: float) -> list[bool]:
    """Whether each of so many steps guesses, where one that does gives so many tokens, one that does not a token, and
    both take a second."""
    found = []
    for _ in range(steps):
        found.append(rate.drafts)
        rate.observe(tokens if rate.drafts else 1, 1.0, *known)
    return found


@pytest.mark.parametrize("tokens", [0.8, 1.5])
def test_the_better_way_is_gone_nearly_always(tokens) -> None:
    found = ways(GuessRate(), 2000, tokens)
    share = sum(found) / len(found)
    assert 0.9 < share < 1 if tokens > 1 else 0 < share < 0.1


def test_where_costs_are_known_the_plain_way_is_never_tried_in_vain() -> None:
    assert all(ways(KnownRate(), 500, 1.5, 1.0))


def test_where_costs_are_known_guessing_is_tried_again() -> None:
    rate = KnownRate()
    found = ways(rate, 2000, 0.8, 1.0)
    assert 0.05 < sum(found) / len(found) < 0.15
    while not rate.drafts:
        rate.observe(1, 1.0, 1.0)
    assert all(ways(rate, 100, 1.5, 1.0)), "what it did not win earlier is held against it"
