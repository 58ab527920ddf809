"""The optimizer step: learning-rate schedule, gradient clipping, fused AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from thornback.actors.specs import OptimizerSpec


class Optimizer:
    """Fused AdamW over a model's trained parameters; weight decay acts on matrices only."""

    def __init__(self, parameters: Iterable[nn.Parameter], spec: OptimizerSpec) -> None:
        self.spec = spec
        self.parameters = [p for p in parameters if p.requires_grad]
        matrices = [p for p in self.parameters if p.dim() >= 2]
        others = [p for p in self.parameters if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": spec.weight_decay}]
        if others:
            groups.append({"params": others, "weight_decay": 0.0})
        self.adamw = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, fused=True)

    def step(self, step: int) -> float:
        """Clip, move the parameters, and drop the gradients. Returns the norm before clipping.

        A norm that is not finite moves nothing: one broken batch must not end a run, and it is seen in the metrics.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.spec.max_grad_norm)
        if hasattr(norm, "full_tensor"):  # FSDP2: each rank holds a part
            norm = norm.full_tensor()
        value = float(norm)
        if math.isfinite(value):
            for group in self.adamw.param_groups:
                group["lr"] = self.spec.learning_rate_at(step)
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return value
