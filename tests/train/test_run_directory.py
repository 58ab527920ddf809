"""A run's files: appended at once, cut back on resume, whole or not there; checkpoints likewise."""

from __future__ import annotations

import pyarrow.fs as pafs
import pytest

from thornback.contracts import DataError
from thornback.train.checkpoint import Checkpoints
from thornback.train.run_directory import JsonLines, RunDirectory


@pytest.fixture
def run(tmp_path):
    return RunDirectory(str(tmp_path / "run"))


def write_state(text="state"):
    def write(location):
        with open(f"{location}/rank-0.safetensors", "w") as file:
            file.write(text)

    return write


def test_line_files_grow_and_are_cut_back(run):
    for step in (1, 2, 3):
        run.metrics.append({"step": step})
    run.event("note", "kept")
    run.rewind(2)
    assert [row["step"] for row in run.metrics.read()] == [1, 2]
    assert [row["kind"] for row in run.events.read()] == ["note"]


def test_a_line_that_a_kill_cut_short_is_dropped(run):
    run.metrics.append({"step": 1})
    with open(run.path("metrics.jsonl"), "a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in run.metrics.read()] == [1]
    run.rewind(5)
    run.metrics.append({"step": 2})
    assert [row["step"] for row in run.metrics.read()] == [1, 2]


def test_where_files_cannot_grow_they_are_written_at_flush(tmp_path):
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())  # no LocalFileSystem itself
    lines = JsonLines(filesystem, "x.jsonl")
    lines.append({"a": 1})
    assert not (tmp_path / "x.jsonl").exists()
    assert lines.read() == [{"a": 1}]
    lines.flush()
    lines.append({"a": 2})
    lines.flush()
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
    lines.keep(lambda row: row["a"] == 2)
    assert lines.read() == [{"a": 2}]


def test_a_uri_is_a_place_like_any(tmp_path):
    run = RunDirectory(f"file://{tmp_path}/run")
    assert run.is_local
    assert run.at("model") == f"{tmp_path}/run/model"
    run.write_text("a.txt", "text")
    assert run.read_text("a.txt") == "text"
    assert run.read_text("b.txt") is None
    assert (tmp_path / "run" / "a.txt").read_text() == "text"


def test_the_newest_checkpoints_stay(run):
    checkpoints = Checkpoints(run, keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 10):
        checkpoints.save(step, {"anchors": None}, write_state())
    latest = checkpoints.latest()
    assert (latest.step, latest.location, latest.state) == (10, run.at("checkpoints", "step-10"), {"anchors": None})
    kept = run.filesystem.get_file_info(pafs.FileSelector(run.path("checkpoints")))
    assert {info.base_name for info in kept} == {"step-2", "step-10"}


def test_a_step_may_be_saved_again(run):
    checkpoints = Checkpoints(run, keep=2)
    checkpoints.save(3, {}, write_state("old"))
    checkpoints.save(3, {}, write_state("newer"))
    assert (run.read_text("checkpoints/step-3/rank-0.safetensors")) == "newer"


def test_a_broken_checkpoint_is_passed_over(run):
    checkpoints = Checkpoints(run, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {}, write_state())
    with open(run.path("checkpoints", "step-3", "rank-0.safetensors"), "w") as file:
        file.write("cut")
    run.remove("checkpoints", "step-2", "state.json")
    assert checkpoints.latest().step == 1
    run.remove("checkpoints", "step-1", "state.json")
    with pytest.raises(DataError, match=r"None of the checkpoints .* is whole"):
        checkpoints.latest()


def test_what_fails_while_it_saves_leaves_the_last_one(run):
    checkpoints = Checkpoints(run, keep=2)
    checkpoints.save(1, {}, write_state())

    def fail(location):
        write_state()(location)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(2, {}, fail)
    assert checkpoints.latest().step == 1
    checkpoints.save(2, {}, write_state())
    assert checkpoints.latest().step == 2
