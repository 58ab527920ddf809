"""Prompts and answers by replicas of their own: ours, with our engine and with vLLM, beside Ray Serve LLM's with vLLM
and NIXL; and all of them unsplit.

One machine, the same tiny model, one replica for prompts and one for answers (unsplit: one for both), a thread each.
Every server has the machine for itself, is started anew in every round, and is asked by a client in another process,
over HTTP, for streams of token ids: one at a time, then eight. Each engine is also called alone, in its own process.

All ratios are ours over Ray Serve LLM's, split, one request at a time, medians of the rounds. `handover`: how much
later the second token comes than from the same server unsplit, which is what it takes from the pass that computed the
prompt to the one that follows it elsewhere (where the first token is sent from is no matter then). `ttft`: time to
the first token. `overhead`, `overhead_p90`: seconds of a request beyond those of a call of the engine alone. `tpot`:
seconds between tokens, `throughput`: requests a second with eight at a time; `startup`: seconds until the first answer.
`vllm_handover`, `vllm_ttft`, `vllm_tpot`, `vllm_throughput`: the same with vLLM under ours too, where
one engine is served in two ways.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Peer, alternate
from benchmarks.models import VOCABULARY, benchmark_model
from benchmarks.peers.http_client import Load, ask, percentiles
from benchmarks.peers.http_server import running
from benchmarks.peers.ray_serve_llm import MAX_MODEL_LEN, MAX_NUM_SEQS, NAME
from benchmarks.peers.vllm_generate import environment
from benchmarks.results import Results, run
from thornback.serve.server import free_port

MODEL_SIZE = "3.7M"
LOAD = Load(num_requests=24, at_once=1, prompt_tokens=448, output_tokens=32, vocab_size=VOCABULARY, seed=0)
QUICK_LOAD = replace(LOAD, num_requests=4)
AT_ONCE = (1, 8)
ROUNDS, QUICK_ROUNDS = 3, 1
OURS, OURS_WHOLE, VLLM, VLLM_WHOLE, THEIRS, THEIRS_WHOLE = SYSTEMS = (
    "thornback split",
    "thornback",
    "thornback with vLLM split",
    "thornback with vLLM",
    "Ray Serve LLM split",
    "Ray Serve LLM",
)


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    load, rounds = (QUICK_LOAD, QUICK_ROUNDS) if quick else (LOAD, ROUNDS)
    results = Results("serve_pd")
    with tempfile.TemporaryDirectory() as directory:
        model = benchmark_model(Path(directory), MODEL_SIZE)
        engines = engines_alone(model, load, rounds, say)
        for number in range(rounds):
            for system in SYSTEMS if number % 2 == 0 else SYSTEMS[::-1]:
                say(f"round {number + 1} of {rounds}: {system}")
                with server(system, model) as (url, startup):
                    ask(url, NAME, replace(load, num_requests=4, seed=-1))  # what is used for the first time
                    for at_once in AT_ONCE:
                        answers = ask(url, NAME, replace(load, at_once=at_once, seed=100 * number + at_once))
                        results.rows.append(row(system, number, at_once, startup, load, answers))
    results.rows += [{"system": f"{name}, engine alone", "at_once": 1, **times} for name, times in engines.items()]
    results.ratios |= ratios(results.rows, engines)
    return results


def row(system: str, number: int, at_once: int, startup: float, load: Load, answers: dict) -> dict[str, Any]:
    requests = answers["requests"]
    gaps = [(r["end"] - r["second"]) / (load.output_tokens - 2) for r in requests]
    return {
        "system": system,
        "round": number,
        "at_once": at_once,
        "startup": startup,
        "ttft": median(r["first"] for r in requests),
        "second": median(r["second"] for r in requests),
        "tpot": median(gaps),
        **percentiles([r["end"] for r in requests]),
        "requests_per_second": len(requests) / answers["seconds"],
        "client_cpu": answers["cpu_seconds"] / answers["seconds"],
    }


def ratios(rows: list[dict[str, Any]], engines: dict[str, dict[str, float]]) -> dict[str, float]:
    def of(system: str, name: str, at_once: int = 1) -> float:
        return median(r[name] for r in rows if r["system"] == system and r["at_once"] == at_once)

    theirs, found = of(THEIRS, "second") - of(THEIRS_WHOLE, "second"), dict[str, float]()
    for kind, split, whole in (("", OURS, OURS_WHOLE), ("vllm_", VLLM, VLLM_WHOLE)):
        found |= {
            f"{kind}handover": (of(split, "second") - of(whole, "second")) / theirs,
            f"{kind}ttft": of(split, "ttft") / of(THEIRS, "ttft"),
            f"{kind}tpot": of(split, "tpot") / of(THEIRS, "tpot"),
            f"{kind}throughput": of(split, "requests_per_second", 8) / of(THEIRS, "requests_per_second", 8),
        }
    found["startup"] = of(OURS, "startup") / of(THEIRS, "startup")
    for name, share in (("overhead", "p50"), ("overhead_p90", "p90")):
        ours = of(OURS, share) - engines["thornback"][share]
        found[name] = ours / (of(THEIRS, share) - engines["vLLM"][share])
    return found


def engines_alone(model: str, load: Load, rounds: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """p50 and p90 of the seconds of a call."""
    settings = {"model": model, "load": asdict(load)}
    peers = [
        Peer("thornback", "benchmarks.peers.thornback_engine:one_by_one", settings),
        Peer("vLLM", "benchmarks.peers.vllm_generate:one_by_one", settings, environment(1, intel_openmp=False)),
    ]
    turns = alternate(peers, rounds, say=say)
    return {name: {share: of.median(share) for share in ("p50", "p90")} for name, of in turns.items()}


@contextmanager
def server(system: str, model: str) -> Iterator[tuple[str, float]]:
    """Where it answers, and the seconds until it did."""
    port = free_port("127.0.0.1", 0)
    split = system.endswith("split")
    if system in (OURS, OURS_WHOLE, VLLM, VLLM_WHOLE):
        command = [
            *("thornback", "serve", model, f"served_model_name={NAME}", "threads_per_replica=1"),
            *(f"engine.max_model_len={MAX_MODEL_LEN}", f"engine.max_num_seqs={MAX_NUM_SEQS}", f"port={port}"),
            *(("--pd", "split_tokens=1") if split else ()),
            *(("--engine", "vllm") if system in (VLLM, VLLM_WHOLE) else ()),
        ]
    else:
        command = ["benchmarks.peers.ray_serve_llm", model, str(port), *(("pd",) if split else ())]
    with running(command, port) as (url, startup, _):
        yield url, startup


if __name__ == "__main__":
    run("serve_pd", measure)
