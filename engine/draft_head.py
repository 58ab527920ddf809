"""The draft head: one decoder layer that guesses what the target will think next (EAGLE; RASD, papers.md section 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from thornback.contracts import ModelError
from thornback.engine.attention import ATTENTION_NAME
from thornback.engine.decoder import LeanModel, angles, use_lean_classes
from thornback.engine.draft_files import ARCHITECTURE, WEIGHTS, read_draft_config
from thornback.engine.linear import use_fast_products
from thornback.engine.model import ModelShape


class DraftHead(LeanModel):
    """Guesses the target's last hidden state after token t from token t and from the hidden state after token t - 1,
    which is the target's own for tokens that it has seen, and a guess of this head beyond them; 0 where it is unknown.

    The embedding of tokens and the output head are the target's, and are not among the parameters.
    """

    def __init__(self, config: Qwen3Config, target: PreTrainedModel, layer_idx: int = 0) -> None:
        """`layer_idx`: the layer of the KV pool that is the head's."""
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.token_norm = Qwen3RMSNorm(size, config.rms_norm_eps)
        self.from_token = nn.Linear(size, size, bias=False)
        self.from_hidden = nn.Linear(size, size, bias=False)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, 0)])
        self.layers[0].self_attn.layer_idx = layer_idx
        self.norm = Qwen3RMSNorm(size, config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        borrowed = {"embed_tokens": target.get_input_embeddings(), "lm_head": target.get_output_embeddings()}
        self.__dict__.update(borrowed)  # around torch, which would take them for the head's own
        use_lean_classes(self, "Qwen3")

    @classmethod
    def new(cls, target: PreTrainedModel, intermediate_size: int | None = None, seed: int = 0) -> DraftHead:
        """An untrained head that fits a target, whose way of guessing at the start is to say the same again."""
        shape, of = ModelShape.of(target), target.config.get_text_config()
        config = Qwen3Config(
            vocab_size=of.vocab_size,
            hidden_size=of.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=of.num_attention_heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=intermediate_size or getattr(of, "intermediate_size", None) or 4 * of.hidden_size,
            max_position_embeddings=shape.max_positions,
            rms_norm_eps=1e-6,
        )
        config._attn_implementation = ATTENTION_NAME
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(config, target)
            for linear in (module for module in head.modules() if isinstance(module, nn.Linear)):
                nn.init.normal_(linear.weight, std=0.5 * linear.in_features**-0.5)
            nn.init.eye_(head.from_hidden.weight)
        use_fast_products(head)
        weight = target.get_input_embeddings().weight
        return head.to(device=weight.device, dtype=weight.dtype)

    @property
    def base_model(self) -> DraftHead:
        return self

    def forward(self, token_ids: Tensor, hidden: Tensor, positions: Tensor, batch: Any) -> Tensor:  # type: ignore[override]
        """`token_ids` and `positions` `[T]`, `hidden` `[T, H]`; returns the guessed hidden states `[T, H]`."""
        x = self.from_token(self.token_norm(self.embed_tokens(token_ids))) + self.from_hidden(hidden)
        turns = angles(self.rotary_emb, x, positions[None])
        for layer in self.layers:
            x = layer(x, turns, batch)
        return self.norm(x)

    def save(self, directory: str | Path) -> None:
        """Write the head to a directory: config.json, and model.safetensors in the type of the parameters."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self.named_parameters()}, path / WEIGHTS)
        (path / "config.json").write_text(
            json.dumps({**self.config.to_diff_dict(), "architectures": [ARCHITECTURE]}, indent=2) + "\n"
        )


def load_draft_head(directory: str | Path, target: PreTrainedModel, layer_idx: int) -> DraftHead:
    """A saved head under its target. Raises `ModelError` for one that is damaged, or was made for another target."""
    path, shape, of = Path(directory), ModelShape.of(target), target.config.get_text_config()
    wanted = {
        "hidden_size": of.hidden_size,
        "vocab_size": of.vocab_size,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    config = Qwen3Config.from_dict(read_draft_config(path, wanted))
    config._attn_implementation = ATTENTION_NAME
    head = DraftHead(config, target, layer_idx)
    try:
        head.load_state_dict(load_file(path / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"The draft {directory} is damaged: {reason}; train it again with thornback draft.") from error
    use_fast_products(head)
    weight = target.get_input_embeddings().weight
    return head.to(device=weight.device, dtype=weight.dtype).eval()
