"""thornback's engine as a rollout worker runs it, without the actor around it."""

from __future__ import annotations

import gc
import time

from benchmarks.peers.http_client import Load, percentiles
from benchmarks.worker import TurnTaker
from benchmarks.workload import Workload
from thornback.contracts import EngineConfig, Request, SamplingParams
from thornback.engine import TorchEngine, generate


def rollout(turns: TurnTaker, model: str, threads: int, workload: dict[str, int]) -> None:
    work, turn = Workload(**workload), 0
    engine = TorchEngine(model, EngineConfig(num_threads=threads))
    gc.freeze()  # as the actor does
    while turns.wait():
        requests = [
            Request(str(i), tuple(ids), SamplingParams(max_tokens=work.new_tokens, ignore_eos=True, seed=i))
            for i, ids in enumerate(work.prompts(turn))
        ]
        turn += 1
        started = time.perf_counter()
        samples = generate(engine, requests)
        seconds = time.perf_counter() - started
        turns.report(seconds=seconds, tokens=sum(len(s.token_ids) for group in samples.values() for s in group))


def one_by_one(turns: TurnTaker, model: str, load: dict[str, int]) -> None:
    """The seconds of single requests, of a call to the engine and nothing else."""
    work, turn = Load(**load), 0
    engine = TorchEngine(model, EngineConfig(num_threads=1, max_model_len=512, max_num_seqs=32))
    gc.freeze()
    sampling = SamplingParams(temperature=0.0, max_tokens=work.output_tokens, ignore_eos=True, seed=0)
    while turns.wait():
        taken = []
        for prompt in work.prompts(turn):
            started = time.perf_counter()
            generate(engine, [Request("r", tuple(prompt), sampling)])
            taken.append(time.perf_counter() - started)
        turn += 1
        turns.report(**percentiles(taken))
