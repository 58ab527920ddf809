"""Requests that one engine prefills and another goes on with."""

from __future__ import annotations

from thornback.contracts import Request, SamplingParams

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, seed=11)
SIZES = {"block_size": 4, "num_blocks": 48, "max_model_len": 128, "max_num_seqs": 8}


def prefilled(engine, name: str, prompt):
    """The output that carries the export."""
    engine.add_request(Request(name, prompt, PARAMS, export_kv=True))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs[-1]
