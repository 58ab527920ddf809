"""The report's pictures: matplotlib drawings as SVG text that takes its colours and its font from the page.

matplotlib wants real colours, the page wants to choose them by theme. So every colour here is a stand-in
that `_themed` replaces by a CSS variable, and one drawing serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from thornback.train.report.record import Row, RunRecord, is_number

INK, MUTED, GRID = "#010100", "#010101", "#010102"
SERIES = ("#020200", "#020201", "#020202", "#020203", "#020204", "#020205", "#020206")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", **{c: f"--series-{i}" for i, c in enumerate(SERIES)}}
POINTS_SHOWN = 600
SIZE_INCHES = (5.6, 2.75)
STYLE: Any = {  # Any: the stubs spell out every key that a style may have
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PHASES = ("rollout", "reward", "advantage", "update", "sync", "evaluate", "checkpoint")


@dataclass(frozen=True)
class Plot:
    """One picture with its words. `svg` goes into the page as it is."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Line:
    """A curve over steps. `smooth`: the values are noisy; show them faintly under their moving average."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    smooth: bool = False
    points: bool = False
    color: str = ""


def all_plots(run: RunRecord) -> list[Plot]:
    """Every picture that the run has figures for, in the order in which they are read."""
    thinned = replace(run, metrics=thin(run.metrics))
    return [plot for draw in DRAWINGS if (plot := draw(thinned)) is not None]


def thin(metrics: list[Row], limit: int = POINTS_SHOWN) -> list[Row]:
    """At most `limit` rows: the means of neighbouring steps, since more points than pixels only make a page heavy."""
    size = -(-len(metrics) // limit)
    if size <= 1:
        return metrics
    chunks = [metrics[start : start + size] for start in range(0, len(metrics), size)]
    return [
        {key: _mean([row[key] for row in chunk if is_number(row.get(key))]) for key in chunk[0]} for chunk in chunks
    ]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def rewards(run: RunRecord) -> Plot | None:
    lines = [Line(name, *run.series(f"reward/{name}/mean"), smooth=True) for name in run.reward_names]
    return _plot("Rewards", "Mean of each reward over a step's rollouts.", lines, _percent)


def accuracy(run: RunRecord) -> Plot | None:
    lines = [
        Line("training rollouts", *run.series("accuracy"), smooth=True, color=MUTED),
        Line("held out, sampled", *run.evaluation_series("sampled"), points=True, color=SERIES[0]),
        Line("held out, greedy", *run.evaluation_series("greedy"), points=True, color=SERIES[1]),
    ]
    return _plot(
        "Accuracy", "Share of right answers. Evaluations use problems that training never sees.", lines, _percent
    )


def effective_weights(run: RunRecord) -> Plot | None:
    lines = [Line(name, *run.series(f"weight/{name}"), smooth=True) for name in run.reward_names]
    caption = "What each reward weighs in the advantages, mean over groups: the reward that still varies weighs more."
    return _plot("Effective weights", caption, lines, _percent)


def advantages(run: RunRecord) -> Plot | None:
    names = {"largest": "abs_max", "mean size": "abs_mean", "mean square": "mean_square"}
    lines = [Line(label, *run.series(f"advantage/{key}"), smooth=True) for label, key in names.items()]
    return _plot("Advantages", "Absolute size over a step's rollouts, and mean square.", lines)


def kl(run: RunRecord) -> Plot | None:
    line = Line("", *run.series("kl"), smooth=True)
    return _plot("Distance from the reference", "KL divergence from the reference policy, in nats a token.", [line])


def mismatch(run: RunRecord) -> Plot | None:
    names = {"mean": "mean_abs", "largest": "max_abs"}
    lines = [Line(label, *run.series(f"mismatch/{key}"), smooth=True) for label, key in names.items()]
    caption = "How far the log-probabilities of the trainer are from those at sampling, before the update."
    return _plot("Sampler against trainer", caption, lines, log=True)


def entropy(run: RunRecord) -> Plot | None:
    line = Line("", *run.series("entropy"), smooth=True)
    return _plot("Entropy", "Of the policy's next-token distribution, in nats a token.", [line])


def response_length(run: RunRecord) -> Plot | None:
    line = Line("", *run.series("response_length"), smooth=True)
    return _plot("Response length", "Mean tokens of a response.", [line])


def throughput(run: RunRecord) -> Plot | None:
    line = Line("", *run.series("tokens_per_second"), smooth=True)
    return _plot("Throughput", "Response tokens a second, whole step.", [line], _thousands)


def guesses(run: RunRecord) -> Plot | None:
    lines = [
        Line("of the rollouts' tokens", *run.series("rollout/accepted_share"), smooth=True),
        Line("of the draft head's first choices", *run.series("rollout/draft_agreement"), points=True),
    ]
    caption = "Share of the rollouts' tokens that were guessed, and right."
    if len(lines[1].steps):
        caption += " And how often a draft head's first choice was the policy's, before each refresh."
    return _plot("Guessed tokens", caption, lines, _percent)


def phases(run: RunRecord) -> Plot | None:
    """Seconds of each phase of each step, stacked."""
    steps = [row["step"] for row in run.metrics]
    seconds = {p: np.array([float(row.get(f"phase/{p}") or 0.0) for row in run.metrics]) for p in PHASES}
    total = sum(float(s.sum()) for s in seconds.values())
    seconds = {phase: s for phase, s in seconds.items() if s.sum() > 0.005 * total}  # thinner ones cannot be seen
    if not seconds:
        return None

    def draw(axes: Axes) -> None:
        width = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 1.0
        edges = np.append(np.array(steps), steps[-1] + width) - width / 2
        bottom = np.zeros(len(steps))
        for color, (phase, s) in zip(SERIES, seconds.items(), strict=False):
            axes.stairs(bottom + s, edges, baseline=bottom, fill=True, label=phase, color=color, linewidth=0)
            bottom = bottom + s

    shares = ", ".join(f"{phase} {s.sum() / total:.0%}" for phase, s in seconds.items())
    return Plot("Time", f"Seconds of each step. In all: {shares}.", _svg("Time", draw, legend=True))


DRAWINGS: tuple[Callable[[RunRecord], Plot | None], ...] = (
    *(accuracy, rewards, effective_weights, advantages, response_length),
    *(entropy, kl, mismatch, phases, throughput, guesses),
)


def _plot(
    title: str, caption: str, lines: Iterable[Line], formatter: Callable[[float], str] | None = None, log: bool = False
) -> Plot | None:
    """Curves over steps; None where no curve has a point."""
    drawn = [line for line in lines if len(line.steps)]
    if not drawn:
        return None
    positive = [value for line in drawn for value in line.values if value > 0]

    def draw(axes: Axes) -> None:
        text = formatter
        for color, line in zip(SERIES, drawn, strict=False):
            _draw_line(axes, line, line.color or color)
        if log and positive:
            axes.set_yscale("log")
            axes.set_ylim(10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(max(positive))))
            axes.yaxis.set_minor_locator(NullLocator())
            text = _power_of_ten
        if text is not None:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
        if formatter is _percent:
            axes.set_ylim(-0.02, None if max(max(line.values) for line in drawn) < 0.7 else 1.02)

    return Plot(title, caption, _svg(title, draw, legend=len(drawn) > 1))


def _draw_line(axes: Axes, line: Line, color: str) -> None:
    style: dict[str, Any] = {"marker": "o", "markersize": 4.5} if line.points or len(line.steps) == 1 else {}
    if line.smooth and len(line.values) > 8:
        axes.plot(line.steps, line.values, color=color, linewidth=1, alpha=0.28)
        axes.plot(line.steps, _moving_average(np.asarray(line.values)), color=color, linewidth=2, label=line.label)
    else:
        axes.plot(line.steps, line.values, color=color, linewidth=2, label=line.label, **style)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a tenth of the run; the window shrinks at the ends, so that they are not bent."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _svg(name: str, draw: Callable[[Axes], None], legend: bool) -> str:
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):  # the same run gives the same file
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.set_xlabel("step")
        if legend:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=5, handlelength=1.1, columnspacing=1.4, borderaxespad=0.2
            )
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(out.getvalue(), name)


def _themed(svg: str, name: str) -> str:
    """Colours and fonts become the page's; the fixed size becomes a viewBox that scales."""
    svg = svg[svg.index("<svg") :]
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{name}"', svg, count=1)


def _percent(value: float) -> str:
    return f"{value * 100:.0f}%"


def _power_of_ten(value: float) -> str:
    return "10" + str(round(math.log10(value))).translate(SUPERSCRIPTS) if value > 0 else ""


def _thousands(value: float) -> str:
    return f"{value:,.0f}"
