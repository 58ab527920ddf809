"""The demo: a model from nothing, trained on several rewards at once, served, and asked. One process, no downloads.

It lives above `train` and `serve`, since it is made of both: a run of the Trainer, then an endpoint for its model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from thornback.contracts import NotImproved
from thornback.demo_tasks import DEMOS, Demo
from thornback.train.cluster import cluster
from thornback.train.config import RunConfig, make_config
from thornback.train.durations import duration
from thornback.train.report import Change, before_and_after, read_run


def demo_config(seed: int, directory: str, task: str = "arithmetic", engine: str = "torch") -> RunConfig:
    """What the demo of a task trains, from one seed, with rollouts by `engine`."""
    settings = DEMOS[task].settings
    parts = ("demo", *([task] if task != "arithmetic" else []), *([engine] if engine != "torch" else []), str(seed))
    run = {**settings["run"], "name": "-".join(parts), "dir": directory, "seed": seed}
    rollout, model = {**settings["rollout"], "engine": engine}, settings["model"]
    if engine != "torch":
        model = {"build": {**model["build"], "head_dim": 32}}  # vLLM on CPU has no narrower heads
    return make_config({**settings, "run": run, "rollout": rollout, "model": model}, source="the demo")


def run_demo(seed: int = 0, directory: str = "", task: str = "arithmetic", engine: str = "torch") -> None:
    """Everything, from nothing, into `directory`. Raises NotImproved where the model did not get better."""
    demo, config = DEMOS[task], demo_config(seed, directory, task, engine)
    console = Console()
    started = time.monotonic()
    console.print(f"thornback demo of {task} with seed {seed}: everything goes to {config.directory}/", highlight=False)
    with cluster(config.run.address):
        train(config, console)
    with stage(console, "Serving the model, and asking it through the openai client"):
        serve_and_ask(config, demo, console)
    changes = before_and_after(read_run(config.directory))
    console.print("\n", table_of(changes), sep="")
    console.print(f"Report: {config.directory}/report.html", highlight=False)
    console.print(f"All of it took {duration(time.monotonic() - started)}.", highlight=False)
    check_improved(changes, demo)


def train(config: RunConfig, console: Console) -> None:
    """The stages of training; each finds what the one before left in the run directory."""
    from thornback.train import Trainer
    from thornback.train.jobs import presample
    from thornback.train.session import Session

    trainer = Trainer(config)
    build = "Building a model and its tokenizer, and warming it up on imperfect demonstrations"
    with stage(console, build), Session.open(config, trainer.problem) as session:
        console.print(f"  {session.model}", highlight=False)
    with stage(console, "Sampling reference rollouts: anchors, and which problems are worth training on"):
        presample(config)
    rewards = ", ".join(trainer.problem.names)
    with stage(console, f"Training on several rewards at once ({rewards}) with anchored DVAO"):
        trainer.train()


def serve_and_ask(config: RunConfig, demo: Demo, console: Console) -> None:
    """An endpoint on a free port of this machine, and some questions to it."""
    from openai import OpenAI

    from thornback.serve import start

    with start(f"{config.directory}/model", port=0, engine={"name": config.rollout.engine}) as server:
        console.print(f"  listening at {server.base_url}", highlight=False)
        client = OpenAI(base_url=server.base_url, api_key="none", timeout=60, max_retries=0)
        for line in demo.ask(client, client.models.list().data[0].id, config):
            console.print(f"  {line}", highlight=False, markup=False)


@contextmanager
def stage(console: Console, title: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    console.print(f"\n[bold]{title}[/bold]")
    started = time.monotonic()
    yield
    console.print(f"  took {duration(time.monotonic() - started)}", style="dim", highlight=False)


def table_of(changes: Sequence[Change]) -> Table:
    """The before/after table, for a terminal: a row for each figure, sampled and greedy side by side."""
    modes = list(dict.fromkeys(change.mode for change in changes))
    table = Table(title="On held-out problems", title_justify="left", title_style="bold", show_edge=False)
    table.add_column("")
    for mode in modes:
        for heading in (f"{mode}\nbefore", "\nafter", "\nchange"):
            table.add_column(heading, justify="right")
    by_name = {(change.name, change.mode): change for change in changes}
    for name in dict.fromkeys(change.name for change in changes):
        cells = [cell for mode in modes for cell in _cells(by_name.get((name, mode)))]
        table.add_row(name, *cells, style="bold" if name == "accuracy" else None)
    return table


def _cells(change: Change | None) -> tuple[str, str, str]:
    """Before, after, change; shares as percentages."""
    if change is None:
        return "", "", ""
    unit = 100.0 if change.is_share else 1.0
    return f"{change.before * unit:.1f}", f"{change.after * unit:.1f}", f"{change.difference * unit:+.1f}"


def check_improved(changes: Sequence[Change], demo: Demo) -> None:
    """Raise NotImproved unless sampled accuracy rose as `demo` wants, and nothing else fell by more than it allows."""
    by_name = {(change.mode, change.name): change for change in changes}
    accuracy = by_name.get(("sampled", "accuracy"))
    if accuracy is None:
        raise NotImproved("The demo's run has no evaluation before and after; see the events in its report.")
    wanted = max(accuracy.before + demo.gain, demo.factor * accuracy.before)
    if accuracy.after < wanted:
        raise NotImproved(
            f"The model did not improve enough: sampled accuracy went from {accuracy.before:.1%} to "
            f"{accuracy.after:.1%}, and not to {wanted:.1%}."
        )
    if accuracy.before < demo.least_before:
        raise NotImproved(
            f"The warm start was too weak: sampled accuracy was {accuracy.before:.1%}, "
            f"less than {demo.least_before:.0%}."
        )
    for change in changes:
        if change.is_share and change.difference < -demo.loss_allowed:
            raise NotImproved(
                f"The model got worse at something: {change.name} ({change.mode}) fell from {change.before:.1%} to "
                f"{change.after:.1%}."
            )
