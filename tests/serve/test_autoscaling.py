"""Replicas come and go with the load, on a Ray cluster of several nodes."""

from __future__ import annotations

import re
import threading
import time

import httpx
import pytest
from ray.serve.config import AutoscalingContext

from thornback.serve.autoscaling import DEMAND, by_demand

MODEL = "tiny"


def context(**metrics) -> AutoscalingContext:
    return AutoscalingContext(
        None, "Decode", "thornback", 2, 2, [], 0, 0, None, metrics, 1, 8, {}, None, None, None, None
    )  # fmt: skip


class Value:
    def __init__(self, timestamp: float, value: float) -> None:
        self.timestamp, self.value = timestamp, value


@pytest.mark.parametrize(
    ("series", "wanted"),
    [
        ({}, 2),  # nothing is known: as many as there are
        ({"a": []}, 2),
        ({"a": [Value(2.0, 3.2), Value(1.0, 9.0)]}, 4),
        ({"a": [Value(1.0, 0.3)], "b": [Value(1.0, 2.02)]}, 2),
        ({"a": [Value(1.0, 0.0)]}, 0),  # Ray Serve sees to the least
    ],
)
def test_as_many_replicas_as_there_is_work_for(series, wanted):
    assert by_demand(context(**{DEMAND: series})) == (wanted, {})


@pytest.fixture(scope="module")
def nodes():
    """A Ray of three nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def replicas(server) -> dict[str, int]:
    names = [engine.partition("#")[0] for engine in server.engines()]
    return {name: names.count(name) for name in ("Prefill", "Decode")}


def transfers(server) -> dict[str, float]:
    found = re.findall(r'kv_transfer_requests_total{.*way="(\w+)"} (\S+)', server.page())
    return {way: sum(float(count) for name, count in found if name == way) for way, _ in found}


def wait_for(server, wanted: dict[str, int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (there := replicas(server)) != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    assert there == wanted


@pytest.mark.full
def test_both_pools_follow_the_load_and_nothing_is_lost(nodes, serve, byte_model):
    server = serve(
        byte_model,
        "--pd",
        "proxy_location=HeadOnly",  # the nodes are of one machine, and would share a port
        f"ray_address={nodes.address}",
        f"served_model_name={MODEL}",
        "threads_per_replica=1",
        "max_replicas=2",
        "max_prefill_replicas=2",
        "upscale_delay_s=1",
        "downscale_delay_s=15",
        "first_token_seconds=0.3",  # so that prompts of 1000 tokens are a load
        "engine.max_num_seqs=4",
        "split_tokens=8",
    )
    wait_for(server, {"Prefill": 1, "Decode": 1}, 60)
    over, failures, answered = threading.Event(), [], []

    def client(seed: int) -> None:
        number = 0
        with httpx.Client(base_url=server.url, trust_env=False, timeout=120) as http:
            while not over.is_set():
                # Half of them want long answers to long prompts, half the beginning of one.
                tokens = 200 if seed % 2 else 2
                body = {"model": MODEL, "prompt": [seed, *[7] * 1000], "max_tokens": tokens, "ignore_eos": True}
                body["prompt"][1] = number = (number + 1) % 250  # which no cache knows
                answer = http.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    answered.append(len(answer.json()["choices"][0]["text"]))
                elif answer.status_code == 429:  # too late: that is what was asked for
                    time.sleep(0.1)
                else:
                    failures.append(answer.text)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(3, 19)]
    for one in clients:
        one.start()
    try:
        most, deadline = {"Prefill": 0, "Decode": 0}, time.monotonic() + 150
        while most != {"Prefill": 2, "Decode": 2} and time.monotonic() < deadline:
            time.sleep(0.5)
            most = {name: max(count, most[name]) for name, count in replicas(server).items()}
        assert most == {"Prefill": 2, "Decode": 2}
        # One that is under way when replicas go, and is not refused before.
        body = {"model": MODEL, "prompt": "on and on", "max_tokens": 6000, "ignore_eos": True, "seed": 1}
        body["first_token_seconds"] = 120
        long = httpx.Client(base_url=server.url, trust_env=False, timeout=300)
        texts: list[str] = []
        last = threading.Thread(target=lambda: texts.append(long.post("/v1/completions", json=body).text))
        last.start()
    finally:
        over.set()
        for one in clients:
            one.join()
    assert not failures
    assert answered
    wait_for(server, {"Prefill": 1, "Decode": 1}, 90)
    last.join()
    assert '"finish_reason":"length"' in texts[0]
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    ways = transfers(server)
    assert ways["object_store"] > 0  # between the nodes
    assert server.metric("thornback:kv_transfer_failures_total") <= 0.02 * sum(ways.values())  # of replicas that went
