"""vLLM on CPU, in its own process, as its documentation advises: libraries preloaded, prefix caching on.

Compiled (its default) or eager, whichever is faster here: the benchmark takes both. No seeds and no
log-probabilities are asked of it, which spares it work that ours does.
"""

from __future__ import annotations

import ctypes.util
import sys
import time
from pathlib import Path

from benchmarks.peers.http_client import Load, percentiles
from benchmarks.worker import TurnTaker
from benchmarks.workload import Workload


def environment(threads: int, intel_openmp: bool) -> dict[str, str | None]:
    """What must be set before its process starts. Its documentation advises tcmalloc (taken where the system has it)
    and, on x86, Intel's OpenMP, which comes with its package."""
    preload = [name for name in (ctypes.util.find_library("tcmalloc_minimal"),) if name]
    if intel_openmp:
        preload.append(str(Path(sys.prefix) / "lib" / "libiomp5.so"))
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": None,
        "GOMP_SPINCOUNT": None,
        "LD_PRELOAD": ":".join(preload) or None,
    }


def rollout(turns: TurnTaker, model: str, eager: bool, workload: dict[str, int]) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    work, turn = Workload(**workload), 0
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=eager,
        max_model_len=work.max_length,
        max_num_seqs=work.num_prompts,
        enable_prefix_caching=True,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=1.0, max_tokens=work.new_tokens, ignore_eos=True, detokenize=False)
    while turns.wait():
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in work.prompts(turn)]
        turn += 1
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        turns.report(seconds=seconds, tokens=sum(len(o.outputs[0].token_ids) for o in outputs))


def one_by_one(turns: TurnTaker, model: str, load: dict[str, int]) -> None:
    """The seconds of single requests, of a call to the engine and nothing else."""
    from vllm import LLM, SamplingParams, TokensPrompt

    work, turn = Load(**load), 0
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=32, disable_log_stats=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=work.output_tokens, ignore_eos=True, detokenize=False)
    while turns.wait():
        taken = []
        for prompt in work.prompts(turn):
            started = time.perf_counter()
            llm.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
            taken.append(time.perf_counter() - started)
        turn += 1
        turns.report(**percentiles(taken))
