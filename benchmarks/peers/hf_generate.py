"""`transformers`' own `generate`: one padded batch, all sequences in step, its dynamic cache, SDPA attention."""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.worker import TurnTaker
from benchmarks.workload import Workload


def rollout(turns: TurnTaker, model: str, threads: int, workload: dict[str, int]) -> None:
    torch.set_num_threads(threads)
    work, turn = Workload(**workload), 0
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    while turns.wait():
        prompts = torch.tensor(work.prompts(turn))
        turn += 1
        started = time.perf_counter()
        with torch.inference_mode():
            output = network.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=work.new_tokens,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - started
        turns.report(seconds=seconds, tokens=output.numel() - prompts.numel())
