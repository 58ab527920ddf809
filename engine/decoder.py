"""Llama-like models in fewer operations: the same modules, weights and names, with leaner forward passes.

A small model on CPU spends more time between its operations than in them, so that half as many are nearly twice as
fast. Models whose modules are not of these classes run through transformers' code as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

FAMILIES = ("Llama", "Qwen2", "Qwen3")


class _RMSNorm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class _MLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Attention(nn.Module):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    layer_idx: int
    scaling: float

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        """`x` `[T, H]`; `angles`: cos and sin `[T, head_dim / 2]`."""
        q, k, v = (project(x).view(len(x), -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (_rotated(x, getattr(self, norm, None), *angles) for x, norm in ((q, "q_norm"), (k, "k_norm")))
        out = batch.attend(self.layer_idx, q, k, v, self.scaling, getattr(self, "sliding_window", None))
        return self.o_proj(out.reshape(len(x), -1))


def _rotated(x: Tensor, norm: nn.Module | None, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[T, heads, D]`, normalised head by head where the model does so, and rotated by its positions' angles."""
    if norm is not None:
        x = norm(x)
    left, right = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class _DecoderLayer(nn.Module):
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, batch)
        return x + self.mlp(self.post_attention_layernorm(x))


class LeanModel(nn.Module):
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, batch: Any, use_cache: bool = False, **_: object
    ) -> BaseModelOutputWithPast:
        """`input_ids` and `position_ids` `[1, T]`."""
        x = self.embed_tokens(input_ids[0])
        turns = angles(self.rotary_emb, x, position_ids)
        for layer in self.layers:
            x = layer(x, turns, batch)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x)[None])


def angles(rotary: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, `[T, head_dim / 2]`."""
    if rotary.rope_type in ("dynamic", "longrope"):  # the frequencies depend on the positions
        cos, sin = rotary(x, position_ids)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
    angles = torch.outer(position_ids[0].float(), rotary.inv_freq)
    return (angles.cos() * rotary.attention_scaling).to(x.dtype), (angles.sin() * rotary.attention_scaling).to(x.dtype)


_LEAN = {"RMSNorm": _RMSNorm, "MLP": _MLP, "Attention": _Attention, "DecoderLayer": _DecoderLayer, "Model": LeanModel}


def is_lean(base: nn.Module) -> bool:
    """Whether a model without its head is of a known family, and has the forward passes of this file."""
    return isinstance(base, LeanModel)


def use_lean_forward(model: PreTrainedModel) -> None:
    """Change the classes of a model's modules, if all that matter are of a known family."""
    base, config = model.base_model, model.config.get_text_config()
    family = next((f for f in FAMILIES if type(base).__name__ == f"{f}Model"), None)
    if family is None or config.hidden_act != "silu":
        return
    if base.rotary_emb.inv_freq.numel() * 2 != base.layers[0].self_attn.head_dim:
        return  # only a part of each head is rotated
    use_lean_classes(base, family)


def use_lean_classes(base: nn.Module, family: str) -> None:
    """Change the classes of the modules that are of a family, by their names."""
    for module in base.modules():
        kind = type(module).__name__.removeprefix(family)
        if kind in _LEAN:
            module.__class__ = type(type(module).__name__, (_LEAN[kind], type(module)), {})
