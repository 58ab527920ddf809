"""A learner rank's state on disk, and the finished model in Hugging Face layout."""

from __future__ import annotations

import tempfile

import pyarrow.fs as pafs
import torch
from torch import Tensor

from thornback.actors.locations import join, local_model, resolve
from thornback.actors.optimizer import Optimizer
from thornback.actors.policy import Policy
from thornback.actors.tensor_file import read_tensors, write_tensors
from thornback.contracts import DataError
from thornback.data import load_tokenizer
from thornback.engine.weights import TORCH_DTYPES


def save_state(location: str, rank: int, policy: Policy, optimizer: Optimizer) -> None:
    """Trained weights, AdamW's moments and the random state as `rank-N.safetensors`.

    Whole models are the same on every rank, so the first writes for all; shards are each rank's own.
    """
    if rank > 0 and policy.spec.strategy == "ddp":
        return
    tensors: dict[str, Tensor] = {"random/cpu": torch.get_rng_state()}
    if policy.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(policy.device)
    num_steps = 0
    for name, parameter in policy.trained.items():
        tensors[f"weight/{name}"] = _local(parameter)
        state = optimizer.adamw.state.get(parameter)
        if state:
            num_steps = int(state["step"])
            tensors[f"exp_avg/{name}"] = _local(state["exp_avg"])
            tensors[f"exp_avg_sq/{name}"] = _local(state["exp_avg_sq"])
    filesystem, path = resolve(join(location, f"rank-{rank}.safetensors"))
    write_tensors(filesystem, path, tensors, {"optimizer_steps": str(num_steps), **_held(policy)})


@torch.no_grad()
def restore_state(location: str, rank: int, policy: Policy, optimizer: Optimizer) -> None:
    """The inverse of `save_state`, bit for bit. Raises `DataError` if the state is of another kind of group."""
    source = 0 if policy.spec.strategy == "ddp" else rank
    filesystem, path = resolve(join(location, f"rank-{source}.safetensors"))
    metadata, tensors = read_tensors(filesystem, path)
    held = _held(policy)
    if any(metadata.get(key) != value for key, value in held.items()):
        found = {key: metadata.get(key) for key in held}
        raise DataError(f"The checkpoint {location} holds {found}, but this learner is {held}: keep the settings.")
    trained = policy.trained
    num_steps = int(metadata["optimizer_steps"])
    for name, tensor in tensors:
        kind, _, key = name.partition("/")
        if kind == "random":
            _set_random_state(key, tensor, policy.device)
        elif kind == "weight":
            _local(trained[key]).copy_(tensor)
        else:
            state = optimizer.adamw.state[trained[key]]
            state.setdefault("step", torch.tensor(float(num_steps), device=_step_device(policy.device)))
            state[kind] = torch.zeros_like(trained[key])
            _local(state[kind]).copy_(tensor)


def export_model(location: str, policy: Policy) -> None:
    """Weights (adapters merged), configuration and tokenizer. Every rank must call it; the first writes."""
    buffer = policy.publish()
    if buffer is None:
        return
    weights = torch.from_numpy(buffer)
    tensors = {
        spec.name: weights[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec in policy.index
    }
    filesystem, path = resolve(location)
    write_tensors(filesystem, f"{path}/model.safetensors", tensors, {"format": "pt"})
    with tempfile.TemporaryDirectory() as directory:
        policy.model.config.dtype = policy.dtype
        policy.model.config.save_pretrained(directory)
        if policy.model.generation_config is not None:
            policy.model.generation_config.save_pretrained(directory)
        load_tokenizer(local_model(policy.spec.model)).save_pretrained(directory)
        pafs.copy_files(directory, path, destination_filesystem=filesystem)


def _held(policy: Policy) -> dict[str, str]:
    """How the state is spread: it fits only a group that is spread the same way."""
    shards = torch.distributed.get_world_size() if policy.spec.strategy == "fsdp2" else 1
    return {"strategy": policy.spec.strategy, "shards": str(shards), "lora": str(policy.spec.lora)}


def _local(tensor: Tensor) -> Tensor:
    """A sharded tensor's part on this rank."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.data


def _step_device(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cpu")  # where fused AdamW keeps its count


def _set_random_state(kind: str, state: Tensor, device: torch.device) -> None:
    if kind == "cpu":
        torch.set_rng_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
