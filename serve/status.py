"""A server's state as a table for a terminal, from what it tells Prometheus."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from thornback.contracts import DataError

PERIOD_S = 1.0
TIMEOUT_S = 10.0
_BAR = 6  # characters


@dataclass
class Sample:
    """A page of /metrics at a time: sums over labels, and values by engine."""

    time: float
    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    engines: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    model: str = ""

    @classmethod
    def read(cls, page: str, now: float) -> Sample:
        sample = cls(now)
        for family in text_string_to_metric_families(page):
            for name, labels, value, *_ in family.samples:
                sample.totals[name] += value
                sample.model = labels.get("model_name", sample.model)
                if "engine" in labels:
                    sample.engines[labels["engine"]][name] += value
                if "le" in labels:
                    sample.buckets[name.removesuffix("_bucket")][float(labels["le"])] += value
        return sample


def fetch(url: str) -> Sample:
    """What the server at `url` says now; raises `DataError` where none answers."""
    try:
        with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client:
            answer = client.get(f"{url.rstrip('/')}/metrics")
            answer.raise_for_status()
            return Sample.read(answer.text, time.monotonic())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise DataError(f"No thornback server answers at {url}: {error or type(error).__name__}") from error


def watch(url: str, once: bool = False) -> None:
    """Show the server until Ctrl-C, or `once`. Where nobody looks at a terminal, once too."""
    console = Console()
    before = fetch(url)
    if once or not console.is_terminal:
        time.sleep(PERIOD_S)
        console.print(render(url, before, fetch(url)))
        return
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(PERIOD_S)
            try:
                now = fetch(url)
                live.update(render(url, before, now), refresh=True)
                before = now
            except DataError as error:
                live.update(Text(str(error), style="red"), refresh=True)


def render(url: str, before: Sample, now: Sample) -> RenderableType:
    """The requests' line, and a line for each replica; rates are those between two samples."""

    def rate(name: str) -> float:
        return max(0.0, now.totals[name] - before.totals[name]) / max(now.time - before.time, 1e-9)

    title = Text.assemble((now.model or "no replica yet", "bold"), f"  {url}")
    tokens, prompts = rate("vllm:generation_tokens_total"), rate("vllm:prompt_tokens_total")
    firsts = [_quantile(now, before, "vllm:time_to_first_token_seconds", share) for share in (0.5, 0.9)]
    line = Text(
        f"{tokens:,.0f} tokens/s, {prompts:,.0f} prompt tokens/s, {now.totals['thornback:gateway_queued']:.0f} queued, "
        f"{rate('thornback:request_errors_total'):,.1f} refused or failed/s\n"
        f"first token: half {_seconds(firsts[0])}, nine of ten {_seconds(firsts[1])}"
    )
    table = Table(box=None, padding=(0, 1, 0, 0))  # fits 80 columns
    table.add_column("replica", no_wrap=True)
    table.add_column("acts as", no_wrap=True)
    for name in ("run", "wait"):
        table.add_column(name, justify="right")
    table.add_column("cache", no_wrap=True)
    for name in ("moves", "copies", "fails", "ver."):
        table.add_column(name, justify="right")
    for engine in sorted(now.engines):
        if "vllm:num_requests_running" in now.engines[engine]:  # else it has gone, and its counters stay
            table.add_row(*_row(engine, now.engines[engine], before.engines[engine], now.time - before.time))
    return Group(title, line, table)


def _row(engine: str, now: Mapping[str, float], before: Mapping[str, float], seconds: float) -> list[str | Text]:
    def since(name: str) -> float:
        return max(0.0, now[name] - before[name])

    transfers = since("thornback:kv_transfer_requests_total")
    copies = since("thornback:kv_transfer_calls_total")
    return [
        engine,
        _acts(engine.partition("#")[0], now["thornback:lent"] > 0),
        f"{now['vllm:num_requests_running']:.0f}",
        f"{now['vllm:num_requests_waiting']:.0f}",
        _bar(now["vllm:kv_cache_usage_perc"]),
        f"{transfers / seconds:.1f}",
        f"{copies / transfers:.2f}" if transfers else "-",
        f"{now['thornback:kv_transfer_failures_total']:.0f}",
        f"{now['thornback:weight_version']:.0f}",
    ]


def _acts(deployment: str, lent: bool) -> Text:
    roles = {"Prefill": ("prefill", "decode"), "Decode": ("decode", "prefill")}
    home, other = roles.get(deployment, ("both", "both"))
    return Text(f"{other} (lent)", style="yellow") if lent else Text(home)


def _bar(share: float) -> Text:
    full = round(share * _BAR)
    style = "green" if share < 0.7 else "yellow" if share < 0.9 else "red"
    return Text.assemble(("█" * full, style), ("░" * (_BAR - full), "dim"), f" {share:4.0%}")


def _quantile(now: Sample, before: Sample, name: str, share: float) -> float | None:
    """The upper bound of the bucket in which it lies; of what came between the samples, or of all if nothing did."""
    counts = {le: n - before.buckets[name][le] for le, n in now.buckets[name].items()}
    if not counts or max(counts.values()) <= 0:
        counts = dict(now.buckets[name])
    if not counts or max(counts.values()) <= 0:
        return None
    return min(le for le, n in counts.items() if n >= share * max(counts.values()))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"< {value:g} s"
