"""The simulated cluster does what a cluster does, and the benchmark says what came of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks import cluster_sim
from benchmarks.cluster import policies
from benchmarks.cluster.measured import measured
from benchmarks.cluster.simulation import simulate
from benchmarks.cluster.traces import LENGTHS, Arrival, poisson, read_mooncake, shifting
from thornback.algorithms import Node, PlacementConfig, Role

NODE = Node("n", prefill_rate=1000.0, step_seconds=0.01, sample_seconds=0.001, context_seconds=1e-6, capacity=10_000)


def run(trace, nodes, policy=policies.OURS):
    config = PlacementConfig()
    return simulate(trace, nodes, policies.make(policy, nodes, config), 0.5, 10_000.0)


def test_one_request_takes_what_its_steps_take() -> None:
    (job,) = run([Arrival(1.0, 3000, 5)], [NODE])
    assert job.first_token == pytest.approx(1.0 + 3.0)  # two chunks
    steps = 4 * (0.01 + 0.001) + 1e-6 * sum(3001 + i for i in range(4))
    assert job.end == pytest.approx(job.first_token + steps, rel=1e-3)


def test_a_hand_over_takes_the_way_between_two_machines() -> None:
    nodes = [replace(NODE, node_id="p", machine="a", role=Role.PREFILL), replace(NODE, node_id="d", machine="b")]
    (far,) = run([Arrival(0.0, 1000, 2)], nodes, policies.STATIC)
    (near,) = run([Arrival(0.0, 1000, 2)], [replace(n, machine="a") for n in nodes], policies.STATIC)
    assert far.end - near.end == pytest.approx(0.5 + 0.1)
    assert far.first_token == near.first_token


def test_a_prompt_slows_those_that_decode_beside_it() -> None:
    trace = [Arrival(0.0, 10, 200), Arrival(0.5, 2000, 1)]
    alone, _ = run([*trace[:1], Arrival(9.0, 10, 1)], [NODE])
    beside, _ = run(trace, [NODE])
    assert beside.end - alone.end == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("policy", cluster_sim.NAMES)
def test_every_request_ends_with_all_its_tokens(policy) -> None:
    trace = poisson("mixed", 6.0, 20.0, seed=3)
    nodes = cluster_sim.cluster("A100:2+L20:2")
    jobs = run(trace, nodes, policy)
    assert len(jobs) == len(trace) > 80
    for job in jobs:
        assert job.said == job.arrival.num_outputs
        assert job.arrival.time < job.first_token <= job.end
        assert not math.isnan(job.end)


def test_nobody_decodes_more_than_fits() -> None:
    trace = [Arrival(0.0, 3000, 100) for _ in range(8)]
    jobs = run(trace, [NODE])
    ends = sorted(job.end for job in jobs)
    assert ends[-1] > ends[2] + 1.0  # three at a time


def test_traces_have_the_rates_and_lengths_that_they_say() -> None:
    for lengths in LENGTHS:
        trace = poisson(lengths, 20.0, 300.0, seed=0)
        assert len(trace) == pytest.approx(6000, rel=0.05)
    bursts = poisson("chat", 20.0, 300.0, seed=0, bursts=5.0)
    assert len(bursts) == pytest.approx(6000, rel=0.06)
    inside = sum(a.time % 30 < 5 for a in bursts) / len(bursts)
    assert inside == pytest.approx(0.5, abs=0.03)
    shifts = shifting({"longbench": 5.0, "chat": 50.0}, 60.0, 15.0, seed=0)
    assert [a.time for a in shifts] == sorted(a.time for a in shifts)
    assert sum(a.num_tokens for a in shifts if a.time < 15) > sum(a.num_tokens for a in shifts if 15 < a.time < 30)


def test_mooncakes_traces_are_read(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
        '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
    )
    assert read_mooncake(path) == [Arrival(0.0, 6758, 500), Arrival(3.0, 6955, 52)]
    path.write_text('{"timestamp": 3000}\n')
    with pytest.raises(ValueError, match="line 1, is no request"):
        read_mooncake(path)


def test_a_given_trace_and_mix_are_measured(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "".join(f'{{"timestamp": {i * 200}, "input_length": 900, "output_length": 20}}\n' for i in range(40))
    )
    results = cluster_sim.measure(True, lambda line: None, trace=str(path), mix="L20:1+H20:2")
    assert [row["policy"] for row in results.rows] == list(cluster_sim.NAMES)
    assert all(row["requests"] == 40 for row in results.rows)
    assert set(results.ratios) == {"worst_vs_best_alternative", "decision_microseconds"}
    cluster_sim.draw(results.rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no card"):
        cluster_sim.cluster("B200:1+H20:2")


def test_a_models_own_speeds_are_measured(tiny_model) -> None:
    node = measured(str(tiny_model("qwen3")))
    assert node.prefill_rate > 100
    assert 0 < node.step_seconds < 1
    assert node.capacity > 512


@pytest.mark.full
def test_the_placer_beats_the_others_where_it_must() -> None:
    """The benchmark's claims, on one seed."""
    found = cluster_sim.measure(True, lambda line: None).ratios
    assert found["latency_imbalance_vs_static"] < 0.85
    assert found["goodput_bursts_vs_static"] > 1.3
    assert found["goodput_vs_colocated"] > 1.25
    assert found["worst_vs_best_alternative"] > 0.96
