"""What Prometheus reads, under vLLM's names where vLLM has one."""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from thornback.contracts import EngineLoad, SpeculationStats

disable_created_metrics()  # a second series for every counter, which nobody reads

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """The counters of one gateway. `model` is the label `model_name` of each."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        labels = ["model_name"]

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, [*labels, *more], registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, [*labels, "engine"], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry).labels(model)

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
        self._queued = Gauge("thornback:gateway_queued", "Requests waiting at the gateway.", registry=self.registry)

    def request_clock(self, num_prompt_tokens: int) -> RequestClock:
        """Starts to measure one prompt."""
        self.prompt_tokens.inc(num_prompt_tokens)
        self.prompt_lengths.observe(num_prompt_tokens)
        return RequestClock(self)

    def error(self, status: int) -> None:
        self._errors.labels(self._model, str(status)).inc()

    def success(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def render(self, loads: Mapping[str, EngineLoad], num_queued: int) -> bytes:
        """The page that Prometheus scrapes, with each replica's load."""
        self._queued.set(num_queued)
        for values in (self._running, self._waiting, self._kv_use, self._preempted, self._version):
            values.clear()  # replicas come and go
        for engine, load in loads.items():
            labels = (self._model, engine)
            self._running.labels(*labels).set(load.num_running)
            self._waiting.labels(*labels).set(load.num_waiting)
            self._kv_use.labels(*labels).set(load.kv_use)
            self._preempted.labels(*labels).set(load.num_preempted)
            self._version.labels(*labels).set(load.weight_version)
            if load.speculation is not None:
                self._count(engine, load.speculation)
        return generate_latest(self.registry)

    def _count(self, engine: str, stats: SpeculationStats) -> None:
        """Add what an engine has speculated since it was asked last."""
        new = stats.since(self._seen[engine]) if engine in self._seen else stats
        self._seen[engine] = stats
        for field, values in self._speculated.items():
            values.labels(self._model, engine).inc(getattr(new, field))
        for position, count in enumerate(new.per_position):
            if count:
                self._per_position.labels(self._model, engine, str(position)).inc(count)


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
