"""What a replica's steps take on this machine, measured in thornback's engine."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from thornback.algorithms import Node

if TYPE_CHECKING:
    from thornback.engine import TorchEngine

PROMPT, STEPS, ROUNDS = 512, 16, 3  # tokens of a long prompt; steps that are timed, and how often
SAMPLES, SHORT = (1, 8), 16


def measured(model: str) -> Node:
    """The speeds of a model directory's engine: of prompts, and, fitted by least squares, of steps that decode, of each
    sample and of each token of context in them."""
    from thornback.contracts import EngineConfig
    from thornback.engine import TorchEngine

    engine = TorchEngine(model, EngineConfig(enable_prefix_caching=False))
    longest = min(PROMPT, engine.max_model_len - STEPS - 1)
    prompts = [_steps(engine, 1, longest)[0] for _ in range(ROUNDS)]
    rows, seconds = [], []
    for samples in SAMPLES:
        for context in (SHORT, longest):
            for _ in range(ROUNDS):
                rows.append((1.0, samples, samples * context))
                seconds.append(_steps(engine, samples, context)[1])
    step, sample, token = np.maximum(np.linalg.lstsq(np.array(rows), np.array(seconds), rcond=None)[0], 1e-9)
    capacity = engine.load().num_blocks * engine.config.block_size
    return Node(
        "",
        prefill_rate=longest / median(prompts),
        step_seconds=float(step),
        sample_seconds=float(sample),
        context_seconds=float(token),
        capacity=capacity,
    )


def _steps(engine: TorchEngine, samples: int, context: int) -> tuple[float, float]:
    """Seconds of the step that computes the prompts, and of one that decodes, the median."""
    from thornback.contracts import Request, SamplingParams

    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=STEPS, ignore_eos=True, seed=0)
    for number in range(samples):
        prompt = tuple(rng.integers(1, engine.shape.vocab_size, context).tolist())
        engine.add_request(Request(str(number), prompt, sampling))
    took = []
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        engine.step()
        took.append(time.perf_counter() - started)
    return took[0], median(took[-STEPS // 2 :])
