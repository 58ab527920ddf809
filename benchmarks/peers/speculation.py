"""Answers to the prompts of four tasks, one at a time: thornback with each source of guesses, vLLM, `transformers`.

Every peer gets the same prompts in the same turn, answers greedily, and reports each task's tokens and seconds; ours
also a checksum of the tokens, passes, nodes, and seconds of drafting and of retrieval.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import count, cycle
from typing import Any

import numpy as np

from benchmarks.worker import TurnTaker

Prompts = dict[str, list[list[int]]]  # of each task
LEAST_BATCH = 4  # requests of a turn: a turn of one would be over before the machine has changed its mind
SOURCES = {"plain": "", "prompt lookup": "p", "retrieval": "r", "draft": "d", "rasd": "prd"}


def _report(turns: TurnTaker, prompts: Prompts, per_turn: int, answer: Callable[[list[int]], dict[str, float]]) -> None:
    """Each turn takes the next prompts of every task; `answer` says what one of them took."""
    turn = 0
    while turns.wait():
        sums: dict[str, float] = {}
        for task, of_task in prompts.items():
            for place in range(turn * per_turn, (turn + 1) * per_turn):
                started = time.perf_counter()
                measured = answer(of_task[place % len(of_task)])
                measured.setdefault("seconds", time.perf_counter() - started)
                for name, value in measured.items():
                    sums[f"{task} {name}"] = sums.get(f"{task} {name}", 0.0) + value
        turn += 1
        turns.report(**sums)


def make_engine(
    model: str,
    source: str,
    draft: str,
    datastore: str,
    num_nodes: int,
    adaptive: bool,
    threads: int,
    engine: str = "torch",
) -> tuple[Any, dict[str, float]]:
    """An engine of this name, and the seconds that its sources take, as they add up. vLLM asks no draft head."""
    from thornback.contracts import EngineConfig, SpeculationConfig
    from thornback.data import Datastore, PromptLookup
    from thornback.engine import TorchEngine

    uses = SOURCES[source] if engine == "torch" else SOURCES[source].replace("d", "")
    clock = {"retrieval": 0.0, "drafting": 0.0}
    retrievers: list[Any] = [PromptLookup()] if "p" in uses else []
    if "r" in uses:
        retrievers.append(Datastore.open(datastore))
    for retriever in retrievers:
        retriever.retrieve_all = _timed(retriever.retrieve_all, clock, "retrieval")
    speculation = SpeculationConfig(num_nodes=num_nodes, adaptive=adaptive, draft=draft if "d" in uses else "")
    config = EngineConfig(num_threads=threads, speculation=speculation if uses else None)
    if engine == "vllm":
        from thornback.engine.vllm_engine import VllmEngine

        return VllmEngine(model, config, tuple(retrievers)), clock
    made = TorchEngine(model, config, tuple(retrievers))
    if made.drafter is not None:
        made.drafter.propose = _timed(made.drafter.propose, clock, "drafting")
    return made, clock


def thornback(turns: TurnTaker, prompts: Prompts, per_turn: int, new_tokens: int, **made_of: Any) -> None:
    """`made_of`: see `make_engine`."""
    from thornback.contracts import Request, SamplingParams

    engine, clock = make_engine(**made_of)

    def answer(prompt: list[int]) -> dict[str, float]:
        before, clocks = engine.speculation.stats, dict(clock)
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        engine.add_request(Request("a", tuple(prompt), sampling))
        tokens: list[int] = []
        passes = 0
        started = time.perf_counter()
        while engine.has_unfinished_requests():
            passes += bool(tokens)
            for output in engine.step():
                tokens += output.token_ids
        seconds = time.perf_counter() - started
        after = engine.speculation.stats
        return {
            **_counts(tokens, passes),
            "seconds": seconds,
            "nodes": 0 if before is None or after is None else after.num_draft_tokens - before.num_draft_tokens,
            **{name: clock[name] - clocks[name] for name in clock},
        }

    _report(turns, prompts, per_turn, answer)


def batches(
    turns: TurnTaker, prompts: list[list[int]], sizes: list[int], new_tokens: int, temperature: float, **made_of: Any
) -> None:
    """A turn answers as many prompts at once as the next of `sizes` says, the next ones every time, small batches
    several times over, and reports the tokens and seconds of what comes after every prompt's first token."""
    from thornback.contracts import Request, SamplingParams

    engine, _ = make_engine(**made_of)
    sampling, number = SamplingParams(max_tokens=new_tokens, temperature=temperature, ignore_eos=True), 0
    for size in cycle(sizes):
        if not turns.wait():
            return
        tokens, seconds = 0, 0.0
        for _ in range(max(1, LEAST_BATCH // size)):
            for _ in range(size):
                prompt = tuple(prompts[number % len(prompts)])
                engine.add_request(Request(str(number), prompt, replace(sampling, seed=number)))
                number += 1
            begun: set[str] = set()
            while len(begun) < size:
                begun |= {output.request_id for output in engine.step()}
            started = time.perf_counter()
            while engine.has_unfinished_requests():
                tokens += sum(len(output.token_ids) for output in engine.step())
            seconds += time.perf_counter() - started
        turns.report(**{f"seconds {size}": seconds, f"tokens {size}": tokens})


def _counts(tokens: list[int], passes: int) -> dict[str, float]:
    """Of one answer. `passes`: those that decode, since a prompt's are the same for all."""
    checksum = zlib.crc32(np.asarray(tokens, np.int32).tobytes())
    return {"tokens": len(tokens), "decoded": len(tokens) - 1, "passes": passes, "checksum": checksum}


def _timed(function: Callable[..., Any], clock: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            clock[name] += time.perf_counter() - started

    return call


def vllm(
    turns: TurnTaker, model: str, method: dict[str, Any] | None, prompts: Prompts, per_turn: int, new_tokens: int
) -> None:
    """`method`: vLLM's `speculative_config`, or None."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    longest = max(len(p) for of_task in prompts.values() for p in of_task)
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,  # the faster of the two here: see the rollout benchmark
        max_model_len=longest + new_tokens + 64,  # nearer to it than its proposals are long, vLLM drafts zeros
        max_num_seqs=1,
        disable_log_stats=True,
        speculative_config=method,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    number = count()

    def answer(prompt: list[int]) -> dict[str, float]:
        tokens: list[int] = []
        engine, passes = llm.llm_engine, 0
        started = time.perf_counter()
        engine.add_request(str(next(number)), TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            passes += bool(tokens)
            for output in engine.step():
                tokens += output.outputs[0].token_ids
        seconds = time.perf_counter() - started
        return {**_counts(tokens, passes), "seconds": seconds}

    _report(turns, prompts, per_turn, answer)


def transformers(
    turns: TurnTaker, model: str, lookup: int | None, prompts: Prompts, per_turn: int, new_tokens: int, threads: int
) -> None:
    """`lookup`: `prompt_lookup_num_tokens`, or None."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()

    def answer(prompt: list[int]) -> dict[str, float]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                prompt_lookup_num_tokens=lookup,
                pad_token_id=0,
            )
        return {"tokens": output.shape[1] - len(prompt)}

    _report(turns, prompts, per_turn, answer)
