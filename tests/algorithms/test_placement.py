"""Where requests go, and which replicas do what, by what was placed and has not ended."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thornback.algorithms import Node, PlacementConfig, Placer, Role, State

CONFIG = PlacementConfig(first_token_seconds=1.0, token_seconds=0.05, num_output_tokens=100)
NODE = Node("", prefill_rate=1000.0, step_seconds=0.01, sample_seconds=0.001, context_seconds=1e-6, capacity=20_000)


def placer(prefills: int = 2, decodes: int = 2, config: PlacementConfig = CONFIG, **nodes) -> Placer:
    made = Placer(config)
    for role, count in ((Role.PREFILL, prefills), (Role.DECODE, decodes)):
        for i in range(count):
            made.add(replace(NODE, node_id=f"{role.name[0].lower()}{i}", role=role, **nodes))
    return made


def test_long_prompts_are_split_and_spread() -> None:
    made = placer()
    placed = [made.place(0.0, 500) for _ in range(4)]
    assert sorted(p.prefill for p in placed) == ["p0", "p0", "p1", "p1"]
    assert sorted(p.decode for p in placed) == ["d0", "d0", "d1", "d1"]
    assert all(p.split and p.same_machine for p in placed)
    assert made.queued("p0") == 1000
    for p in placed:
        made.prefilled(p)
        made.finished(p, 100)
    assert made.queued("p0") == 0
    assert made.loads()[0] == 0


def test_short_prompts_and_whole_requests_stay_where_they_are_decoded() -> None:
    made = placer()
    for placed in (made.place(0.0, CONFIG.split_tokens - 1), made.place(0.0, 500, whole=True)):
        assert not placed.split
        assert placed.decode.startswith("d")
    assert made.place(0.0, 500, {"d0": 480}).decode == "d0"
    assert made.place(0.0, 500, {"d0": 480}).num_hit == 480
    assert placer(0, 1).place(0.0, 500).split is False
    assert Placer(CONFIG).place(0.0, 500) is None


def test_the_faster_replica_gets_more() -> None:
    made = Placer(CONFIG)
    made.add(replace(NODE, node_id="slow", role=Role.PREFILL))
    made.add(replace(NODE, node_id="fast", role=Role.PREFILL, prefill_rate=4000.0))
    made.add(replace(NODE, node_id="d", role=Role.DECODE, capacity=10**9))
    prefills = [made.place(0.0, 500).prefill for _ in range(10)]
    assert prefills.count("fast") == 8
    made.add(replace(NODE, node_id="slow", role=Role.PREFILL, prefill_rate=16_000.0))  # it was measured again
    assert made.place(0.0, 500).prefill == "slow"


def test_a_hand_over_stays_on_its_machine_unless_others_are_much_idler() -> None:
    made = Placer(replace(CONFIG, transfer_seconds=0.05))
    made.add(replace(NODE, node_id="p", role=Role.PREFILL, machine="a"))
    for machine in "ab":
        made.add(replace(NODE, node_id=f"d{machine}", machine=machine))
    assert made.place(0.0, 500).decode == "da"
    placed = [made.place(0.0, 100) for _ in range(12)]
    assert {p.decode for p in placed} >= {"da", "db"}
    assert all(p.same_machine == (p.decode != "db") for p in placed if p.split)


def test_nobody_decodes_without_room() -> None:
    made = placer(1, 2)
    for _ in range(2):
        made.place(0.0, 9000)
    table = {d: sum(made.place(0.0, 4000).decode == d for _ in range(2)) for d in ("d0", "d1")}
    assert all(count <= 2 for count in table.values())


def drive(made: Placer, seconds: float, begin: float = 0.0, every: float = 0.1, tokens: int = 64) -> None:
    """Let time pass, with a trickle of requests that end at once."""
    now = begin
    while now < begin + seconds:
        placed = made.place(now, tokens)
        if placed is not None:
            made.prefilled(placed)
            made.finished(placed, 100)
        now += every


def test_in_imbalance_the_idle_pool_lends_a_replica_and_gets_it_back() -> None:
    made = placer(2, 3)
    held = [made.place(0.0, 900) for _ in range(8)]
    drive(made, 3.0)
    assert made.state is State.IMBALANCE
    lent = [d for d in ("d0", "d1", "d2") if made.acting(d) is Role.PREFILL]
    assert 1 <= len(lent) <= 2  # one decodes on
    for placed in held:
        made.prefilled(placed)
        made.finished(placed, 100)
    drive(made, 1.0, 3.0)
    assert any(made.acting(d) is Role.PREFILL for d in lent)  # a role lasts for some windows
    drive(made, 30.0, 4.0)
    assert all(made.acting(d) is Role.DECODE for d in lent)
    assert made.state is not State.IMBALANCE


def test_a_moment_of_load_changes_no_role() -> None:
    made = placer(2, 3)
    held = [made.place(0.0, 900) for _ in range(8)]
    for placed in held:
        made.prefilled(placed)
        made.finished(placed, 100)
    drive(made, 5.0, 0.4)
    assert made.state in (State.NORMAL, State.EXTREME_LOW)
    assert all(made.acting(d) is Role.DECODE for d in ("d0", "d1", "d2"))


def overloaded() -> Placer:
    made = placer(1, 1)
    for _ in range(40):
        made.place(0.0, 400)
    return made


def test_in_extreme_load_more_replicas_are_asked_for() -> None:
    made = overloaded()
    for i in range(400):
        made.place(i * 0.1, 400)
    assert made.state is State.EXTREME_HIGH
    assert all(wanted > 1 for wanted in made.demand().values())


def in_extreme_load(made: Placer) -> Placer:
    made.state, made._window_end = State.EXTREME_HIGH, float("inf")
    return made


def test_in_extreme_load_what_would_wait_for_others_is_refused_and_what_takes_long_by_itself_is_not() -> None:
    made = in_extreme_load(placer(0, 1, replace(CONFIG, refuses=True)))
    first = made.place(0.0, 5000)  # 5 seconds, of which 1 would be in time
    assert first is not None
    assert made.place(0.1, 64) is None  # behind it
    made.prefilled(first)
    assert made.place(5.1, 64) is not None
    calm = placer(0, 1, replace(CONFIG, refuses=True))
    assert all(calm.place(0.0, 5000) is not None for _ in range(3))


@pytest.mark.parametrize("prepare", [in_extreme_load, lambda made: made])
def test_who_would_wait_for_a_place_in_the_batch_is_refused(prepare) -> None:
    """In any state: where one pool is full and the other idle, nobody can help with less than two there."""
    made = prepare(placer(0, 1, replace(CONFIG, refuses=True), max_num_seqs=4))
    placed = []
    for _ in range(20):
        placed.append(made.place(0.0, 10, whole=True))
        if placed[-1] is not None:
            made.prefilled(placed[-1])
    taken = [p for p in placed if p is not None]
    assert 4 <= len(taken) < 10
    for p in taken:
        made.finished(p, 100)
    assert made.place(1.0, 10, whole=True) is not None


def test_a_place_in_the_batch_comes_free_no_sooner_than_the_oldest_answer_ends() -> None:
    """Not evenly: those that began together end together, here after a second and a half."""
    made = placer(0, 1, replace(CONFIG, refuses=True, first_token_seconds=0.5), max_num_seqs=4)
    held = [made.place(0.0, 10, whole=True) for _ in range(4)]
    for placed in held:
        made.prefilled(placed)
    assert made.place(0.1, 10, whole=True) is None
    late = made.place(1.3, 10, whole=True)
    assert late is not None
    made.prefilled(late)
    assert made.place(1.3, 10, whole=True) is None  # how evenly they end is not known so well
    made.finished(late, 100)
    for placed in held:
        made.finished(placed, 100)
    assert not any(made._answers.values())


def test_a_place_comes_free_when_an_answer_ends_that_began_late() -> None:
    """However long ago it was placed: it waited."""
    for began, time, in_time in ((0.0, 1.3, True), (1.0, 1.3, False), (1.0, 2.3, True)):
        made = placer(0, 1, replace(CONFIG, refuses=True, first_token_seconds=0.5), max_num_seqs=4)
        held = [made.place(0.0, 10, whole=True) for _ in range(4)]
        for placed in held:
            made.prefilled(placed)
            made.begun(placed, began)
        assert (made.place(time, 10, whole=True) is not None) is in_time
        made.finished(held[0], 100)
        made.begun(held[0], 3.0)  # whoever says so too late changes nothing
        assert held[0] not in made._answers["d0"]


def test_what_is_left_of_an_answer_is_known_by_what_came_of_it() -> None:
    """Not by the time that answers took before: this one is quick."""
    for said, in_time in ((10, False), (90, True)):
        made = placer(0, 1, replace(CONFIG, refuses=True, first_token_seconds=0.5), max_num_seqs=4)
        for placed in [made.place(0.0, 10, whole=True) for _ in range(4)]:
            made.prefilled(placed)
            made.begun(placed, 0.0)
            made.said(placed, said)
        assert (made.place(0.3, 10, whole=True) is not None) is in_time


def test_waits_that_turn_out_longer_count_so_for_a_while() -> None:
    made = placer(0, 1, replace(CONFIG, refuses=True, first_token_seconds=3.0), max_num_seqs=1)
    for round in range(9):
        now = 12.0 * round
        held, waits = made.place(now, 10, whole=True), made.place(now, 10, whole=True)
        assert (waits is not None) is (round < 8)
        made.finished(held, 100)
        if waits is not None:
            made.begun(waits, now + 3 * (waits.begins - now))
            made.finished(waits, 100)
    held, waits = made.place(now + 12.0, 10, whole=True), made.place(now + 12.0, 10, whole=True)
    assert waits is not None  # none was late of late


def test_a_request_may_say_itself_what_is_in_time() -> None:
    made = placer(0, 1, replace(CONFIG, refuses=True))
    assert made.place(0.0, 1000, whole=True, first_token_seconds=0.5) is None  # a second's work
    assert made.place(0.0, 1000, whole=True, first_token_seconds=1.5) is not None
    assert made.place(0.0, 1000, whole=True, first_token_seconds=1.5) is None  # behind that
    full = in_extreme_load(placer(0, 1, replace(CONFIG, refuses=True)))
    assert full.place(0.0, 5000) is not None
    assert full.place(0.1, 64) is None
    assert full.place(0.1, 64, first_token_seconds=float("inf")) is not None


def test_one_pool_alone_has_extreme_load_too() -> None:
    made = placer(0, 2)
    for _ in range(40):
        made.place(0.0, 400, whole=True)
    drive(made, 10.0)
    assert made.state is State.EXTREME_HIGH
    assert made.demand()[Role.DECODE] > 2
    assert made.demand()[Role.PREFILL] == 0


def test_a_full_batch_is_a_load() -> None:
    made = placer(0, 2, max_num_seqs=4)
    for _ in range(8):
        made.prefilled(made.place(0.0, 10, whole=True))
    drive(made, 10.0)
    assert made.demand()[Role.DECODE] == pytest.approx(4, rel=0.1)


def test_idle_replicas_are_not_asked_for() -> None:
    made = placer()
    drive(made, 40.0)
    assert made.state is State.EXTREME_LOW
    assert all(wanted < 1 for wanted in made.demand().values())


def test_replicas_of_a_slow_model_are_not_asked_for_while_they_are_idle() -> None:
    made = placer(0, 2, step_seconds=2 * CONFIG.token_seconds)
    made.prefilled(placed := made.place(0.0, 10, whole=True))
    made.look(1.0)
    assert made.demand()[Role.DECODE] > 0
    made.finished(placed, 100)
    for second in range(2, 40):
        made.look(float(second))
    assert made.demand()[Role.DECODE] == pytest.approx(0, abs=1e-3)


def test_a_pool_that_others_can_help_asks_for_no_more() -> None:
    for decodes in (3, 1):
        made = placer(1, decodes)
        for _ in range(12):
            made.place(0.0, 100)
        made._load[:] = 0.9, 0.1
        assert (made.demand()[Role.PREFILL] > 1) == (decodes == 1)


def test_a_replica_that_is_gone_takes_its_work_along() -> None:
    made = placer()
    placed = [made.place(0.0, 500) for _ in range(4)]
    made.remove("p0")
    made.remove("d1")
    assert "p0" not in made
    for p in placed:  # some of which were there
        made.prefilled(p)
        made.finished(p, 100)
    assert made.loads() == (0.0, 0.0)
    assert {made.place(0.0, 500).decode for _ in range(3)} == {"d0"}


@given(st.data())
def test_what_ends_leaves_nothing_behind(data) -> None:
    made = placer(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3)))
    live, now = [], 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        now += data.draw(st.floats(0, 1))
        placed = made.place(now, data.draw(st.integers(1, 2000)))
        if placed is not None:
            live.append(placed)
        if live and data.draw(st.booleans()):
            ended = live.pop(data.draw(st.integers(0, len(live) - 1)))
            made.prefilled(ended)
            made.finished(ended, 10)
    for placed in live:
        made.prefilled(placed)
        made.finished(placed, 10)
    assert not made._table[:, :3].any()
    assert not any(made._answers.values())
