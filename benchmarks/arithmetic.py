"""What a step must compute, and how fast this machine multiplies matrices."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.worker import TurnTaker


@dataclass(frozen=True)
class Arithmetic:
    """Multiplications and additions of a dense decoder, from its config.json."""

    layers: int
    hidden: int
    query: int
    key_value: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def of(cls, model: str) -> Arithmetic:
        config = json.loads((Path(model) / "config.json").read_text())
        head = config["head_dim"]
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["num_attention_heads"] * head,
            config["num_key_value_heads"] * head,
            config["intermediate_size"],
            config["vocab_size"],
        )

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """`(inputs, outputs, how many)` of every matrix product that a token goes through, the head's last."""
        return [
            (self.hidden, self.query, self.layers),
            (self.hidden, self.key_value, 2 * self.layers),
            (self.query, self.hidden, self.layers),
            (self.hidden, self.feed_forward, 2 * self.layers),
            (self.feed_forward, self.hidden, self.layers),
            (self.hidden, self.vocabulary, 1),
        ]

    def forward(self, tokens: int, logits: int, context: float) -> float:
        """Of `tokens` tokens, `logits` of which need a prediction, each looking at `context` keys on average."""
        *layers, (inputs, outputs, _) = self.products
        per_token = sum(2.0 * a * b * count for a, b, count in layers) + 4.0 * self.query * context * self.layers
        return tokens * per_token + logits * 2.0 * inputs * outputs

    def step(self, prompts: int, samples: int, prompt_tokens: int, new_tokens: int) -> float:
        """One training step: every prompt's and every new token's pass while generating, and three times as much
        (forward, and backward for inputs and weights) in the update. A prompt is computed once for its samples."""
        new = prompts * samples * new_tokens
        passes = self.forward(prompts * prompt_tokens, 0, prompt_tokens / 2)
        passes += self.forward(new, new, prompt_tokens + new_tokens / 2)
        return 4.0 * passes


def rate(turns: TurnTaker, products: list[tuple[int, int, int]], rows: int, threads: int) -> None:
    """A peer that does nothing but this model's matrix products in float32, `rows` tokens at a time, and reports
    operations per second, at the best: with torch.mm, and with oneDNN's product, which is faster on some processors."""
    import torch

    torch.set_num_threads(threads)
    weights = [torch.randn(outputs, inputs) for inputs, outputs, _ in products]
    inputs = [torch.randn(rows, inputs) for inputs, _, _ in products]
    operations = sum(2.0 * rows * a * b for a, b, _ in products)
    functions = {
        "mm": lambda x, w: torch.mm(x, w.t()),
        "onednn": lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
    }

    def seconds(function) -> float:
        started = time.perf_counter()
        for x, w in zip(inputs, weights, strict=True):
            function(x, w)
        return time.perf_counter() - started

    with torch.inference_mode():
        while turns.wait():
            turns.report(**{name: operations / min(seconds(f) for _ in range(50)) for name, f in functions.items()})
