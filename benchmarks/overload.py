"""Four times as many requests as a server can take, for a minute.

One replica for prompts and one for answers, a thread each, the tiny model; answers of 256 tokens. First as many
requests as keep it busy, at once, at three levels. Then three rounds, of which medians are given: at the level with the
most tokens a second once more, which are its peak; and requests at random times, four times as many a second as it
answered at its peak, from a client in another process, whose own use of a core is reported.

`ttft_p90`, `tpot_p90`: of the requests that were accepted, over what the server was told to keep; `refusal_p90`:
seconds until the others had their 429; `throughput`: tokens a second, from the tenth second to the last arrival, over
the peak; `memory`: the server's own memory at the end over that after the first ten seconds.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.models import VOCABULARY, benchmark_model
from benchmarks.peers.http_client import Load, ask, percentiles
from benchmarks.peers.http_server import running
from benchmarks.peers.ray_serve_llm import NAME
from benchmarks.results import Results, run
from thornback.serve.server import free_port

MODEL_SIZE = "3.7M"
FIRST_TOKEN_S, TOKEN_S = 2.0, 0.1  # what the server is told to keep
BATCH = 16
LOAD = Load(num_requests=0, at_once=0, prompt_tokens=128, output_tokens=256, vocab_size=VOCABULARY, seed=0)
TIMES, SECONDS, QUICK_SECONDS, ROUNDS = 4.0, 60.0, 15.0, 3
BEGINNING_S = 10.0


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    seconds, rounds = (QUICK_SECONDS, 1) if quick else (SECONDS, ROUNDS)
    results, measured = Results("overload"), []
    port = free_port("127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as directory:
        model = benchmark_model(Path(directory), MODEL_SIZE)
        command = [
            *("thornback", "serve", model, "--pd", f"served_model_name={NAME}", f"port={port}"),
            *(f"engine.max_num_seqs={BATCH}", f"first_token_seconds={FIRST_TOKEN_S}", f"token_seconds={TOKEN_S}"),
            *("threads_per_replica=1", "engine.max_model_len=512", "haproxy=true"),
        ]
        with running(command, port) as (url, _, process):

            def closed(at_once: int, turn: int) -> float:
                say(f"{at_once} at once")
                load = replace(LOAD, num_requests=(1 if quick else 4) * at_once, at_once=at_once, seed=-turn)
                rate = answered_rate(ask(url, NAME, load))
                results.rows.append({"at_once": at_once, "requests_per_second": rate})
                return rate

            ask(url, NAME, replace(LOAD, num_requests=4, at_once=2, seed=-100))
            levels = (BATCH // 2, BATCH, 2 * BATCH)  # either replica has a batch
            best = max(levels, key=lambda at_once: closed(at_once, 0))
            for turn in range(1, rounds + 1):
                peak = closed(best, turn)
                rate = TIMES * peak
                say(f"{rate:.1f} requests a second for {seconds:.0f} s")
                load = replace(LOAD, num_requests=round(rate * seconds), rate=rate, seed=turn)
                memory = Memory(process.pid)
                with memory:
                    answers = ask(url, NAME, load)
                results.rows.append(row(load, answers, memory))
                measured.append(ratios(load, answers, memory, peak))
    results.ratios |= {name: statistics.median(of[name] for of in measured) for name in measured[0]}
    return results


def answered_rate(answers: dict) -> float:
    """Requests a second, but for those that were refused."""
    return sum("end" in r for r in answers["requests"]) / answers["seconds"]


def row(load: Load, answers: dict, memory: Memory) -> dict[str, Any]:
    accepted = sum("end" in r for r in answers["requests"])
    return {
        "requests_per_second": load.rate,
        "accepted": accepted,
        "refused": load.num_requests - accepted,
        "client_cpu": answers["cpu_seconds"] / answers["seconds"],
        "memory_mib": max(memory.values) / 2**20,
    }


def ratios(load: Load, answers: dict, memory: Memory, peak: float) -> dict[str, float]:
    requests = answers["requests"]
    accepted = [r for r in requests if "end" in r]
    between = [(r["end"] - r["second"]) / (load.output_tokens - 2) for r in accepted]
    last = load.num_requests / load.rate
    begin = min(BEGINNING_S, last / 3)
    # Tokens of a request are spread evenly over the time from its first to its last.
    tokens = sum(load.output_tokens * _share(r, begin, last) for r in accepted)
    refused = [r["refused"] for r in requests if "refused" in r]
    return {
        "ttft_p90": percentiles([r["first"] for r in accepted])["p90"] / FIRST_TOKEN_S,
        "tpot_p90": percentiles(between)["p90"] / TOKEN_S,
        "refusal_p90": percentiles(refused)["p90"] if refused else float("nan"),
        "throughput": tokens / (last - begin) / (peak * load.output_tokens),
        "memory": memory.values[-1] / memory.values[min(len(memory.values) - 1, round(begin))],
    }


def _share(request: dict[str, float], begin: float, end: float) -> float:
    """The part of an answer that came between two times."""
    last = request["at"]
    first = last - (request["end"] - request["first"])
    return max(0.0, min(end, last) - max(begin, first)) / max(last - first, 1e-9)


class Memory:
    """What a process and its children use, once a second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.values: list[int] = []

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._over.is_set():
            total = 0
            for process in [psutil.Process(self._pid), *psutil.Process(self._pid).children(recursive=True)]:
                try:
                    memory = process.memory_info()
                    total += memory.rss - memory.shared
                except psutil.NoSuchProcess:
                    continue
            self.values.append(total)
            time.sleep(1.0)


if __name__ == "__main__":
    run("overload", measure)
