"""The model that a learner trains: whole or sharded, all of its weights or adapters, and how it is published."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from thornback.actors.locations import local_model
from thornback.actors.specs import PolicySpec
from thornback.contracts import ModelError, weight_index
from thornback.engine import flatten_parameters, load_model, sequence_logprobs
from thornback.engine.weights import TORCH_DTYPES, parameter_index


class _Logprobs(nn.Module):
    """A model as a function from sequences to log-probabilities: what DDP and FSDP2 wrap."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, sequences: Sequence[np.ndarray], starts: Sequence[int], temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        return sequence_logprobs(self.model, sequences, starts, temperature, with_entropy)


class Policy:
    """The trained model of one rank, of `num_ranks`; the process group must stand if there are several."""

    def __init__(self, spec: PolicySpec, num_ranks: int) -> None:
        self.spec = spec
        self.model = load_model(local_model(spec.model), spec.device, "float32")
        self.device = next(self.model.parameters()).device
        auto = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = auto if spec.dtype == "auto" else TORCH_DTYPES[spec.dtype]
        if spec.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.train()  # transformers checkpoints in training mode only
        self._base_index = parameter_index(self.model)[0]
        self._flat = flatten_parameters(self.model)[0] if spec.strategy == "ddp" else None
        if spec.lora is not None:
            _add_adapters(self.model, *spec.lora)
        self._forward = self._wrap(_Logprobs(self.model), num_ranks)
        self._reference = self._load_reference(num_ranks) if spec.with_reference and spec.lora is None else None
        tag = str(self.dtype).removeprefix("torch.")
        self.index, self._nbytes = weight_index((s.name, tag, s.shape) for s in self._base_index)

    def _wrap(self, module: nn.Module, num_ranks: int) -> nn.Module:
        if self.spec.strategy == "fsdp2":
            return _shard(module, self.dtype, self.device, num_ranks)
        return DistributedDataParallel(module, gradient_as_bucket_view=True) if num_ranks > 1 else module

    def _load_reference(self, num_ranks: int) -> nn.Module:
        model = load_model(local_model(self.spec.model), self.spec.device, str(self.dtype).removeprefix("torch."))
        module = _Logprobs(model.requires_grad_(False))
        return _shard(module, self.dtype, self.device, num_ranks) if self.spec.strategy == "fsdp2" else module

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer moves, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def logprobs(self, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities `[sum T]` of the tokens from `starts[i]` on, with gradients, and entropies `[sum T]`."""
        with self._computing():
            return self._forward(sequences, starts, self.spec.temperature, True)

    @torch.no_grad()
    def reference_logprobs(self, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> Tensor:
        """The same under the model that the run started from."""
        with self._computing():
            if self._reference is not None:
                return self._reference(sequences, starts, self.spec.temperature, False)[0]
            with _adapters_off(self.model):
                return self._forward(sequences, starts, self.spec.temperature, False)[0]

    @contextlib.contextmanager
    def no_sync(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the backward pass of the last micro-batch only."""
        if isinstance(self._forward, DistributedDataParallel) and not last:
            with self._forward.no_sync():
                yield
        else:
            yield

    def _computing(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32 or self.spec.strategy == "fsdp2":  # FSDP2 casts by its own policy
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @torch.no_grad()
    def publish(self) -> np.ndarray | None:
        """The weights as one buffer, uint8 `[bytes]`, laid out by `index`; on ranks after the first, None.

        Whole float32 models on CPU are that buffer already. Adapters are merged: engines see plain weights.
        """
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if not first and self.spec.strategy == "ddp":
            return None
        whole = self.spec.lora is None and self.dtype == torch.float32
        if self._flat is not None and whole and self.device.type == "cpu":
            return self._flat.numpy()
        buffer = torch.empty(self._nbytes, dtype=torch.uint8) if first else None
        parameters = {name.replace(".base_layer", ""): p for name, p in self.model.named_parameters()}
        deltas = dict(_adapter_deltas(self.model)) if self.spec.lora is not None else {}
        for spec in self.index:
            value = _whole(parameters[spec.name])  # a collective where the model is sharded
            if spec.name in deltas:
                value = value + deltas[spec.name]()
            if buffer is not None:
                raw = buffer[spec.offset : spec.offset + spec.nbytes]
                raw.view(self.dtype).view(spec.shape).copy_(value)
        return None if buffer is None else buffer.numpy()


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _shard(module: nn.Module, dtype: torch.dtype, device: torch.device, num_ranks: int) -> nn.Module:
    """FSDP2: each layer is gathered for its own pass; the rest (embedding, norm, head) by the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (num_ranks,))
    options: dict[str, Any] = {"mesh": mesh}
    if dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = next((m for m in module.modules() if isinstance(m, nn.ModuleList)), None)
    if layers is None:
        raise ModelError("This model has no list of layers to shard by; train it with learner.strategy=ddp.")
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(module, **options)


def _add_adapters(model: PreTrainedModel, rank: int, alpha: float, targets: str | tuple[str, ...]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    modules = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, lora_dropout=0.0)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ModelError(f"LoRA does not fit this model: {str(error).splitlines()[0]}") from error


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _adapter_deltas(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """For each adapted weight, a function that computes what its adapter adds to it."""
    for name, layer in _adapter_layers(model):
        yield f"{name}.weight", lambda layer=layer: layer.get_delta_weight("default")


@contextlib.contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    layers = [layer for _, layer in _adapter_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
