"""What a run shows while it runs: two lines that stay in place on a terminal, one line a step elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from thornback.train.durations import duration

STEPS_FOR_ESTIMATE = 20


class ProgressBar:
    """Shows a run's steps: rewards, tokens a second, time left.

    Use as a context, and call `update` with each step's metrics (the keys of metrics.jsonl). On a terminal the
    lines are drawn over; into a file or a pipe goes one line a step and nothing else. `start_step` counts the
    steps that a resumed run has behind it.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, title: str = "training", console: Console | None = None
    ) -> None:
        self._console = console or Console()
        self._total = total_steps
        self._seconds: deque[float] = deque(maxlen=STEPS_FOR_ESTIMATE)
        self._figures = Text()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}", style="dim"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task(title, total=total_steps, completed=start_step, pace="")
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)

    def __enter__(self) -> ProgressBar:
        if self._console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """One step is done."""
        step = int(metrics["step"])
        self._seconds.append(float(metrics.get("step_seconds") or 0.0))
        pace = self._pace(step, metrics)
        self._figures = _figures(metrics)
        self._bar.update(self._task, completed=step, pace=pace)
        if not self._console.is_terminal:
            width = len(str(self._total))
            line = "  ".join(part for part in (self._figures.plain, pace) if part)
            self._console.print(f"step {step:>{width}}/{self._total}  {line}", highlight=False, soft_wrap=True)

    def note(self, message: str) -> None:
        """A line that stays: something happened (an actor was restarted, a checkpoint was written)."""
        self._console.print(Text(message, style="yellow"), soft_wrap=True)

    def _pace(self, step: int, metrics: Mapping[str, Any]) -> str:
        rate = metrics.get("tokens_per_second")
        left = (self._total - step) * sum(self._seconds) / len(self._seconds)
        parts = [f"{rate:,.0f} tokens/s" if rate else "", f"{duration(left)} left" if step < self._total else ""]
        return "  ".join(part for part in parts if part)

    def _render(self) -> Group:
        indented = Table.grid(padding=(0, 0, 0, 1))
        indented.add_row(self._figures)
        return Group(self._bar.get_renderable(), indented)


def _figures(metrics: Mapping[str, Any]) -> Text:
    """`correct 0.81  format 0.97  length 24`: the mean of each reward, and the responses' length."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for key, value in metrics.items():
        if key.startswith("reward/") and key.endswith("/mean") and value is not None:
            text.append(f"{key.split('/')[1]} ").append(f"{value:.2f}  ", "bold cyan")
    if metrics.get("response_length") is not None:
        text.append("length ").append(f"{metrics['response_length']:.0f}", "bold cyan")
    text.rstrip()
    return text
