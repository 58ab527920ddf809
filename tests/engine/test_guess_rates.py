"""Guessing goes on where it wins, stops where it does not, and is tried again."""

from __future__ import annotations

import pytest

from thornback.engine.guess_rates import DraftWorth, GuessRate, KnownRate


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


def drafts(worth: DraftWorth, passes: int, tokens: float) -> list[bool]:
    """Whether each of so many passes drafts, where one that does gives so many tokens in two seconds, one that does not
    a token in one."""
    found = []
    for _ in range(passes):
        found.append(worth.choose(1.0))
        worth.observe(tokens if found[-1] else 1, 2.0 if found[-1] else 1.0)
    return found


@pytest.mark.parametrize("tokens", [1.5, 3.0])
def test_a_draft_is_asked_where_it_is_worth_its_time_and_tried_ever_rarer_where_not(tokens) -> None:
    found = drafts(DraftWorth(), 4000, tokens)
    other = [place for place, way in enumerate(found) if way != (tokens > 2)]
    assert 8 < len(other) < 20
    assert other[-1] - other[-2] > 5 * (other[5] - other[4])


def test_a_draft_that_has_become_worth_it_is_asked() -> None:
    worth = DraftWorth()
    drafts(worth, 1000, 1.5)
    assert sum(drafts(worth, 20000, 4.0)[-5000:]) > 4900
