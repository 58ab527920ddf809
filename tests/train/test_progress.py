"""What a run says while it runs."""

import io
import re
from contextlib import suppress

import pytest
from rich.console import Console

from thornback.train.durations import duration
from thornback.train.progress import ProgressBar


def metrics(step, seconds=2.0):
    return {
        **{
            "step": step,
            "reward/correct/mean": 0.5 + step / 100,
            "reward/correct/std": 0.5,
            "reward/format/mean": 0.97,
        },
        **{"tokens_per_second": 4012.3, "step_seconds": seconds, "response_length": 23.6},
    }


def test_into_a_pipe_goes_one_line_a_step_and_nothing_else():
    out = io.StringIO()
    with ProgressBar(100, console=Console(file=out, width=80)) as bar:
        for step in range(1, 4):
            bar.update(metrics(step))
    assert out.getvalue().splitlines() == [
        "step   1/100  correct 0.51  format 0.97  length 24  4,012 tokens/s  3 min 18 s left",
        "step   2/100  correct 0.52  format 0.97  length 24  4,012 tokens/s  3 min 16 s left",
        "step   3/100  correct 0.53  format 0.97  length 24  4,012 tokens/s  3 min 14 s left",
    ]


def test_on_a_terminal_two_lines_are_drawn_over_and_notes_stay_above_them():
    out = io.StringIO()
    with ProgressBar(4, start_step=2, console=Console(file=out, width=80, force_terminal=True)) as bar:
        bar.update(metrics(3))
        bar.note("rollout worker 1 was started again.")
        bar.update(metrics(4))
    screen = visible_lines(out.getvalue())
    assert screen[0] == "rollout worker 1 was started again."
    assert screen[1].startswith("training ━")
    assert "4/4" in screen[1]
    assert "left" not in screen[1], "nothing is left of a finished run"
    assert screen[2].strip() == "correct 0.54  format 0.97  length 24"
    assert screen[3:] == []


def test_time_left_goes_by_the_latest_steps():
    out = io.StringIO()
    with ProgressBar(1000, console=Console(file=out)) as bar:
        bar.update(metrics(1, seconds=500))
        for step in range(2, 30):
            bar.update(metrics(step, seconds=1))
    assert out.getvalue().splitlines()[-1].endswith("16 min 11 s left")


def test_the_terminal_gets_its_cursor_back_after_ctrl_c():
    out = io.StringIO()
    with suppress(KeyboardInterrupt), ProgressBar(4, console=Console(file=out, force_terminal=True)):
        raise KeyboardInterrupt
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3600, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def visible_lines(output):
    """What a terminal would show at the end: follows line feeds, cursor-up and erase-line."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", output):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.endswith("A") and piece.startswith("\x1b["):
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith("\x1b") and piece != "\r":
            lines[row] += piece
    return [line.rstrip() for line in lines if line.strip()]
