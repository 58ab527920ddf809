"""A model's parameters as one flat buffer: laid out by who trains them, mapped by who generates with them."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from thornback.contracts import STORAGE_DTYPES, ModelError, TensorSpec, WeightView, weight_index

TORCH_DTYPES = {name: getattr(torch, name) for name in STORAGE_DTYPES}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parameter_index(model: nn.Module) -> tuple[tuple[TensorSpec, ...], int]:
    """The index of a model's parameters, tied ones once, and the buffer's size in bytes."""
    return weight_index((name, dtype_name(p.dtype), tuple(p.shape)) for name, p in model.named_parameters())


def flatten_parameters(model: nn.Module) -> tuple[Tensor, tuple[TensorSpec, ...]]:
    """Move all parameters into one uint8 buffer `[bytes]`, of which they become views.

    Training goes on in place, and publishing the weights is one copy of the buffer.
    """
    index, nbytes = parameter_index(model)
    parameters = dict(model.named_parameters())
    buffer = torch.zeros(nbytes, dtype=torch.uint8, device=next(iter(parameters.values())).device)
    for spec in index:
        view = tensor_in(buffer, spec)
        view.copy_(parameters[spec.name].data)
        parameters[spec.name].data = view
    return buffer, index


def copy_parameters(model: nn.Module) -> WeightView:
    """A snapshot of the parameters in host memory."""
    index, nbytes = parameter_index(model)
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    parameters = dict(model.named_parameters())
    for spec in index:
        tensor_in(buffer, spec).copy_(parameters[spec.name].data)
    return WeightView(buffer.numpy(), index)


def bind_weights(model: nn.Module, weights: WeightView) -> None:
    """Give a model these parameters. On CPU, and where the types agree, they become views of the buffer: many
    processes that map it share one copy. Raises `ModelError` if names or shapes differ from the model's."""
    parameters = dict(model.named_parameters())
    found = {spec.name: spec.shape for spec in weights.index}
    wanted = {name: tuple(p.shape) for name, p in parameters.items()}
    if found != wanted:
        name = next(n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n))
        raise ModelError(
            f"The published weights do not fit this model: {name} is {found.get(name, 'missing')} there and "
            f"{wanted.get(name, 'missing')} here; learner and engine must load the same architecture."
        )
    buffer = mapped(weights.buffer)
    for spec in weights.index:
        parameter, source = parameters[spec.name], tensor_in(buffer, spec)
        if parameter.device.type == "cpu" and parameter.dtype == source.dtype:
            parameter.data = source
        elif parameter.data.device.type == "cpu":
            parameter.data = source.to(parameter.dtype)  # never write through an earlier view
        else:
            parameter.data.copy_(source, non_blocking=True)


def unbind_weights(model: nn.Module) -> None:
    """Let go of what `bind_weights` has mapped, so that its memory is free. Until it is called again the model computes
    nonsense, with parameters of the same shapes. Parameters on a GPU are copies, and stay."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)


def mapped(buffer: np.ndarray) -> Tensor:
    """A tensor over a buffer, uint8 `[bytes]`, that is only read: those of the object store cannot be written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(buffer)


def tensor_in(buffer: Tensor, spec: TensorSpec) -> Tensor:
    """One parameter of a flat buffer, uint8 `[bytes]`, as a view of it."""
    return buffer[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)


def tensor_to_numpy(tensor: Tensor) -> np.ndarray:
    """A host tensor as numpy without a copy; bfloat16 as its uint16 bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
