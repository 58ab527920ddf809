"""Pages for Prometheus."""

from __future__ import annotations

import asyncio

import pytest

from thornback.serve.config import ServeConfig
from thornback.serve.errors import Unavailable
from thornback.serve.gateway import Gateway
from thornback.serve.metrics import Metrics, sum_pages


def test_counters_of_several_gateways_are_added() -> None:
    pages = []
    for count in (2, 3):
        metrics = Metrics("m")
        for _ in range(count):
            metrics.success("stop")
            metrics.time_to_first_token.observe(0.02)
        metrics.error(429)
        metrics.error(400 + count)  # which the other has not seen
        pages.append(metrics.own(count))
    page = sum_pages(pages)
    for line in (
        'vllm:request_success_total{finished_reason="stop",model_name="m"} 5.0',
        'vllm:time_to_first_token_seconds_bucket{le="0.025",model_name="m"} 5.0',
        'vllm:time_to_first_token_seconds_bucket{le="0.01",model_name="m"} 0.0',
        'thornback:request_errors_total{model_name="m",status="429"} 2.0',
        "thornback:gateway_queued 5.0",
    ):
        assert line in page.splitlines()
    assert page.count("# TYPE vllm:request_success_total counter") == 1
    names = [line.split("{")[0].split()[0] for line in page.splitlines() if not line.startswith("#")]
    assert len([name for name, before in zip(names, ["", *names], strict=False) if name != before]) == len(set(names))
    assert sum_pages(pages[:1]) == pages[0]


class Siblings:
    """A handle of gateways that answer this, or hang."""

    def __init__(self, answers: list | None) -> None:
        self._answers = answers

    def broadcast(self, method: str):
        assert method == "counters"
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list:
        if self._answers is None:
            raise TimeoutError
        return self._answers


def test_dead_gateways_are_left_out_and_hung_ones_fail_the_page() -> None:
    def counters(answers: list | None) -> list[str]:
        gateway = Gateway(ServeConfig(model="m"), None, None, lambda: Siblings(answers))  # type: ignore[arg-type]
        return asyncio.run(gateway.all_counters())

    assert counters(["a 1.0", RuntimeError("it has died"), "b 2.0"]) == ["a 1.0", "b 2.0"]
    with pytest.raises(Unavailable):
        counters(None)
