"""Turns alternate, never overlap, and end; a peer that fails says why."""

from __future__ import annotations

import os
import time

import pytest

from benchmarks import harness
from benchmarks.harness import Peer, PeerFailed, alternate

FAKES = "tests.benchmarks.fake_peers"


def peer(name: str, diary: str, seconds: float) -> Peer:
    return Peer(name, f"{FAKES}:steady", {"name": name, "diary": diary, "seconds": seconds}, {"FLAG": "3"})


def test_peers_take_turns_in_rotating_order_and_never_work_together(tmp_path) -> None:
    diary = tmp_path / "diary"
    turns = alternate([peer("a", str(diary), 0.01), peer("b", str(diary), 0.02)], rounds=3, warmups=1)
    lines = [line.split() for line in diary.read_text().splitlines()]
    begun = [name for name, what in lines if what == "begins"]
    assert begun == ["a", "b", *"ab", *"ba", *"ab"]  # a warm-up each, then three rounds
    assert all(lines[i + 1] == [lines[i][0], "ends"] for i in range(0, len(lines), 2))
    assert turns["b"].median("seconds") == 0.02
    assert turns["a"].all("flag") == [3.0, 3.0, 3.0]


def test_settings_may_be_longer_than_a_command_line() -> None:
    turns = alternate([Peer("reader", f"{FAKES}:counts", {"text": "x" * 3_000_000})], rounds=1)
    assert turns["reader"].all("length") == [3_000_000]


def test_a_peer_that_dies_is_quoted() -> None:
    with pytest.raises(PeerFailed, match=r"(?s)doomed died while taking its turn.*the peer's own words"):
        alternate([Peer("doomed", f"{FAKES}:dies")], rounds=1)


def test_a_peer_that_hangs_meets_its_deadline_and_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "TURN_SECONDS", 0.2)
    monkeypatch.setattr(harness, "STOP_SECONDS", 0.2)
    child_pid = tmp_path / "pid"
    with pytest.raises(PeerFailed, match=r"did not answer within 0 s"):
        alternate([Peer("stuck", f"{FAKES}:hangs", {"child_pid": str(child_pid)})], rounds=1)
    assert ends(int(child_pid.read_text()))


def ends(pid: int) -> bool:
    """Whether a process that was killed is gone within a second (or waits for its new parent to notice)."""
    for _ in range(20):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return False
