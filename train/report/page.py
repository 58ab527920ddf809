"""Puts the page together: the figures that lead it, the samples, and the template."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import jinja2

from thornback.train.durations import duration
from thornback.train.report.changes import before_and_after
from thornback.train.report.plots import all_plots
from thornback.train.report.record import Row, RunRecord, read_run

SAMPLES_SHOWN = 12
TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory, finished or not, and return its path.

    One file that stands alone: styles, pictures and samples are inside. Raises DataError where `run_dir` is
    no run directory.
    """
    run = read_run(run_dir)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"figure": _figure, "clock": _clock}
    page = environment.from_string(TEMPLATE.read_text()).render(
        run=run,
        changes=before_and_after(run),
        headlines=_headlines(run),
        plots=all_plots(run),
        samples=pick_samples(run, SAMPLES_SHOWN),
    )
    path = Path(run_dir) / "report.html"
    path.write_text(page)
    return path


def pick_samples(run: RunRecord, count: int) -> list[tuple[Row, Row]]:
    """Answers to the same problems before and after: what was learned first, then what was lost, then the rest.

    Both kinds of change are shown whenever there are any, so that the page does not only flatter.
    """
    pairs = [(run.samples_before[key], after) for key, after in run.samples_after.items() if key in run.samples_before]
    learned = [p for p in pairs if not p[0]["correct"] and p[1]["correct"]]
    lost = [p for p in pairs if p[0]["correct"] and not p[1]["correct"]]
    same = [p for p in pairs if bool(p[0]["correct"]) == bool(p[1]["correct"])]
    chosen = [*learned[: count // 2], *lost[: count // 4]]
    chosen += same[: count - len(chosen)]
    return chosen


def _headlines(run: RunRecord) -> list[tuple[str, str]]:
    """(label, figure) of the tiles at the top."""
    seconds = sum(run.series("step_seconds")[1])
    tokens = sum(run.series("tokens")[1])
    rollouts = sum(run.series("num_rollouts")[1])
    tiles = [("steps", f"{len(run.metrics):,}")]
    if rollouts:
        tiles.append(("rollouts", f"{rollouts:,.0f}"))
    if tokens:
        tiles.append(("tokens", _short(tokens)))
    if seconds:
        tiles.append(("in steps", duration(seconds)))
        if tokens:
            tiles.append(("tokens a second", f"{tokens / seconds:,.0f}"))
    return tiles


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _figure(value: float, is_share: bool = True, signed: bool = False) -> str:
    """A share as a percentage, anything else with one digit; a real minus sign."""
    scaled = value * 100 if is_share else value
    text = f"{scaled:+.1f}" if signed else f"{scaled:.1f}"
    unit = ("" if signed else "\u202f%") if is_share else ""
    return text.replace("-", "\u2212") + unit


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
