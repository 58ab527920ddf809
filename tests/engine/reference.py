"""The plain model beside the engine: what a request should have produced, and where floats may decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from thornback.contracts import SamplingParams
from thornback.engine.randomness import positional_uniform

TIE = 1e-4  # design.md: in float32 a first difference is allowed only where candidates are closer than this


def allowed(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Slow and plain: probabilities `[V]` after min_p, top_k and top_p."""
    p = np.exp((logits - logits.max()) / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    total = 0.0
    for token in order:
        if total >= params.top_p:
            p[token] = 0
        total += p[token]
    return p / p.sum()


class Reference:
    """A model run the plain way: one sequence, no cache."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """`[T, V]` in float64."""
        return self.model(torch.tensor([tokens])).logits[0].double()

    @torch.no_grad()
    def greedy(self, prompt: tuple[int, ...], count: int) -> list[int]:
        """transformers' own generate, without an end token."""
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        return out[0, len(prompt) :].tolist()

    def logprobs(self, prompt: tuple[int, ...], tokens: list[int], temperature: float = 1.0) -> np.ndarray:
        """Of `tokens` after `prompt`: float64 `[T]`."""
        scores = (self.logits([*prompt, *tokens])[len(prompt) - 1 : -1] / (temperature or 1.0)).log_softmax(-1)
        return scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()

    def assert_same(self, prompt: tuple[int, ...], got: list[int], wanted: list[int], params: SamplingParams) -> None:
        """Equal, up to a first difference where the two best candidates, or the draw and a CDF's edge, nearly tie."""
        if got == wanted:
            return
        at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
        assert at < min(len(got), len(wanted)), f"{len(got)} tokens instead of {len(wanted)}"
        logits = self.logits([*prompt, *wanted[:at]])[-1]
        if params.temperature == 0:
            best = logits.topk(2).values
            margin = float(best[0] - best[1])
        else:
            edges = (logits / params.temperature).softmax(-1).cumsum(-1).numpy()
            draw = positional_uniform(np.array([params.seed], np.uint64), np.array([at], np.uint64))[0]
            margin = float(np.abs(edges - draw).min())
        assert margin < TIE, f"token {at} differs ({got[at]} instead of {wanted[at]}) with a margin of {margin:.2e}"
