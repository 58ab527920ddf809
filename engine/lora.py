"""LoRA adapters in generation: each token of a batch under the adapter that its request names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from thornback.contracts import ModelError


class AdapterSet:
    """Adapters in peft's layout, applied by a hook on every linear layer that one of them changes.

    `rows` tells which packed tokens of the coming pass run under which adapter; the engine sets it.
    """

    def __init__(self, model: nn.Module, adapters: tuple[tuple[str, str], ...]) -> None:
        self.rows: dict[str, Tensor] = {}
        self.names = frozenset(name for name, _ in adapters)
        self._updates: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}
        for name, directory in adapters:
            self._load(model, name, Path(directory))
        for module in self._updates:
            module.register_forward_hook(self._add_updates)

    def _load(self, model: nn.Module, name: str, directory: Path) -> None:
        if not (directory / "adapter_config.json").is_file():
            raise ModelError(f"Adapter {name}: {directory} has no adapter_config.json; save it with peft first.")
        config = json.loads((directory / "adapter_config.json").read_text())
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            raise ModelError(f"Adapter {name} in {directory} is not a plain LoRA adapter; only those can be served.")
        rank_root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        tensors = load_file(directory / "adapter_model.safetensors")
        modules, weight = dict(model.named_modules()), next(model.parameters())
        for key, a in tensors.items():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
            if not match:
                continue
            if match[1] not in modules:
                raise ModelError(f"Adapter {name} changes {match[1]}, which this model does not have.")
            b = tensors[key.replace("lora_A", "lora_B")] * (config["lora_alpha"] / rank_root)
            pair = (a.to(weight.device, weight.dtype), b.to(weight.device, weight.dtype))
            self._updates.setdefault(modules[match[1]], {})[name] = pair

    def _add_updates(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, y = inputs[0].flatten(0, -2), output.flatten(0, -2)  # views of the packed tokens
        for name, (a, b) in self._updates[module].items():
            rows = self.rows.get(name)
            if rows is not None:
                y.index_add_(0, rows, (x.index_select(0, rows) @ a.T) @ b.T)
        return output

    def place(self, names: list[str | None], lengths: list[int], device: torch.device) -> None:
        """Say which adapter each sequence of the coming pass runs under."""
        where: dict[str, list[int]] = {}
        at = 0
        for name, length in zip(names, lengths, strict=True):
            if name is not None:
                where.setdefault(name, []).extend(range(at, at + length))
            at += length
        self.rows = {name: torch.tensor(rows, device=device) for name, rows in where.items()}
