"""What Prometheus reads, under vLLM's names where vLLM has one."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from thornback.contracts import SpeculationStats, TransferStats
from thornback.serve.link import ReplicaReport

disable_created_metrics()  # a second series for every counter, which nobody reads

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """What one gateway counts, and what replicas report. `model` is the label `model_name` of each."""

    def __init__(self, model: str) -> None:
        self._own, self._engines = CollectorRegistry(), CollectorRegistry()
        labels = ["model_name"]

        def counter(name: str, text: str, *more: str) -> Counter:
            registry = self._engines if "engine" in more else self._own
            return Counter(name, text, [*labels, *more], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, [*labels, "engine"], registry=self._engines)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self._own).labels(model)

        self._model = model
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens taken in.").labels(model)
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.").labels(model)
        self._success = counter("vllm:request_success", "Samples that ended, by reason.", "finished_reason")
        self._errors = counter("thornback:request_errors", "Requests refused or failed, by HTTP status.", "status")
        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds", "To the first token.", _SECONDS)
        self.time_per_token = histogram("vllm:inter_token_latency_seconds", "Between tokens of a sample.", _SECONDS)
        self.latency = histogram("vllm:e2e_request_latency_seconds", "From admission to the last token.", _SECONDS)
        self.queue_time = histogram("vllm:request_queue_time_seconds", "Waiting at the gateway.", _SECONDS)
        self.prompt_lengths = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_lengths = histogram("vllm:request_generation_tokens", "Tokens of a sample.", _TOKENS)
        self._running = gauge("vllm:num_requests_running", "Samples in an engine's batch.")
        self._waiting = gauge("vllm:num_requests_waiting", "Samples that wait in an engine.")
        self._kv_use = gauge("vllm:kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.")
        self._preempted = gauge("thornback:num_preemptions", "Samples that an engine has put back.")
        self._lent = gauge("thornback:lent", "1 while a replica takes the other pool's role.")
        self._version = gauge("thornback:weight_version", "The version of the weights that answer.")
        self._speculated = {
            field: counter(f"vllm:spec_decode_{field}", text, "engine")
            for field, text in (
                ("num_drafts", "Trees that were verified."),
                ("num_draft_tokens", "Tokens of these trees."),
                ("num_accepted_tokens", "Of which so many were right."),
            )
        }
        self._per_position = counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Tokens that were right, by place.", "engine", "position"
        )
        self._speculated["num_failures"] = counter(
            "thornback:spec_decode_num_failures", "Requests whose guesses failed.", "engine"
        )
        self._seen: dict[str, SpeculationStats] = {}  # by engine
        self._transfers = {
            field: counter(f"thornback:kv_transfer_{name}", text, "engine", "way")
            for field, name, text in (
                ("num_transfers", "requests", "Requests whose keys and values were taken over."),
                ("num_calls", "calls", "Copies that took."),
                ("num_bytes", "bytes", "Bytes of them."),
                ("seconds", "seconds", "Seconds of them."),
            )
        }
        self._transfer_failures = counter(
            "thornback:kv_transfer_failures", "Requests that were computed again instead.", "engine"
        )
        self._reported: dict[str, ReplicaReport] = {}  # by engine
        self._queued = Gauge("thornback:gateway_queued", "Requests waiting at the gateways.", registry=self._own)

    def request_clock(self, num_prompt_tokens: int) -> RequestClock:
        """Starts to measure one prompt."""
        self.prompt_tokens.inc(num_prompt_tokens)
        self.prompt_lengths.observe(num_prompt_tokens)
        return RequestClock(self)

    def error(self, status: int) -> None:
        self._errors.labels(self._model, str(status)).inc()

    def success(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def own(self, num_queued: int) -> str:
        """What this gateway has counted, as a page for Prometheus."""
        self._queued.set(num_queued)
        return generate_latest(self._own).decode()

    def render(
        self, reports: Sequence[ReplicaReport], gateways: Sequence[str], lent: Collection[str] = frozenset()
    ) -> str:
        """The page that Prometheus scrapes: the sums of all gateways' `own` pages, and each replica's load. `lent`: the
        ids of those that take the other pool's role."""
        for values in (self._running, self._waiting, self._kv_use, self._preempted, self._version, self._lent):
            values.clear()  # replicas come and go
        for report in reports:
            engine, load = f"{report.deployment}#{report.replica_id}", report.engine
            labels = (self._model, engine)
            self._running.labels(*labels).set(load.num_running)
            self._waiting.labels(*labels).set(load.num_waiting)
            self._kv_use.labels(*labels).set(load.kv_use)
            self._preempted.labels(*labels).set(load.num_preempted)
            self._version.labels(*labels).set(load.weight_version)
            self._lent.labels(*labels).set(report.replica_id in lent)
            if load.speculation is not None:
                self._count(engine, load.speculation)
            self._count_transfers(engine, report)
        return sum_pages(gateways) + generate_latest(self._engines).decode()

    def _count(self, engine: str, stats: SpeculationStats) -> None:
        """Add what an engine has speculated since it was asked last."""
        new = stats.since(self._seen[engine]) if engine in self._seen else stats
        self._seen[engine] = stats
        for field, values in self._speculated.items():
            values.labels(self._model, engine).inc(getattr(new, field))
        for position, count in enumerate(new.per_position):
            if count:
                self._per_position.labels(self._model, engine, str(position)).inc(count)

    def _count_transfers(self, engine: str, report: ReplicaReport) -> None:
        """Add what a replica has taken over since it was asked last."""
        before = self._reported.get(engine)
        self._reported[engine] = report
        failures = report.num_transfer_failures - (before.num_transfer_failures if before else 0)
        self._transfer_failures.labels(self._model, engine).inc(failures)
        for way, stats in report.transfers.items():
            seen = before.transfers.get(way, TransferStats()) if before else TransferStats()
            for field, values in self._transfers.items():
                values.labels(self._model, engine, way).inc(getattr(stats, field) - getattr(seen, field))


def sum_pages(pages: Sequence[str]) -> str:
    """One page, with the sum of each series; those of a metric stand together, as Prometheus wants them."""
    metrics: dict[str, dict[str, float]] = {}  # by what is said of each
    for page in pages:
        said = ""
        for line in page.splitlines():
            if line.startswith("# HELP "):
                said = line
            elif line.startswith("#"):
                said += f"\n{line}"
                metrics.setdefault(said, {})
            else:
                series, _, value = line.rpartition(" ")
                sums = metrics.setdefault(said, {})
                sums[series] = sums.get(series, 0.0) + float(value)
    lines = [line for said, sums in metrics.items() for line in (said, *(f"{k} {v}" for k, v in sums.items()))]
    return "".join(f"{line}\n" for line in lines)


class RequestClock:
    """Measures one prompt from admission to its last token."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._last: dict[int, float] = {}

    def tokens(self, index: int, count: int) -> None:
        """Sample `index` has got `count` tokens."""
        now = time.monotonic()
        self._metrics.generation_tokens.inc(count)
        if not self._last:
            self._metrics.time_to_first_token.observe(now - self._start)
        elif index in self._last and count:
            self._metrics.time_per_token.observe((now - self._last[index]) / count)
        self._last[index] = now

    def finished(self, reason: str, num_tokens: int) -> None:
        self._metrics.success(reason)
        self._metrics.answer_lengths.observe(num_tokens)

    def close(self) -> None:
        self._metrics.latency.observe(time.monotonic() - self._start)
