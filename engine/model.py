"""Loads a decoder-only transformers model with thornback's attention, and reads off it what a cache needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from thornback.contracts import ModelError
from thornback.engine.attention import ATTENTION_NAME
from thornback.engine.decoder import use_lean_forward
from thornback.engine.linear import use_fast_products


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the KV pool and the sampler are sized by."""

    num_layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]
    sliding_window: int | None  # of some layers' attention

    def block_shape(self, block_size: int) -> tuple[int, int, int, int, int]:
        """Of a block of so many tokens in a pool of keys and values (`KVPool`)."""
        return self.num_layers, 2, self.kv_heads, block_size, self.head_dim

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        config = model.config.get_text_config()
        eos = model.generation_config.eos_token_id if model.generation_config else None
        eos = config.eos_token_id if eos is None else eos
        return cls(
            num_layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_positions=getattr(config, "max_position_embeddings", None) or 1 << 20,
            eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
            sliding_window=getattr(config, "sliding_window", None),
        )


def resolve_device(device: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on CUDA, float32 on CPU."""
    return (torch.bfloat16 if device.type == "cuda" else torch.float32) if dtype == "auto" else getattr(torch, dtype)


def load_model(model: str | Path, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """A model by directory or hub name, in evaluation mode, whose forward takes `batch=` (see attention.py).

    Raises `ModelError` where the directory is no model or lacks some of its weights, or the architecture cannot take
    our attention.
    """
    place = resolve_device(device)
    check_model_directory(model)
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=resolve_dtype(dtype, place),
            attn_implementation=ATTENTION_NAME,
            ignore_mismatched_sizes=True,  # which the report tells
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{model} cannot be loaded as a decoder-only model: {reason}") from error
    finally:
        if progress:
            transformers_logging.enable_progress_bar()
    # transformers would go on with random numbers in their place.
    missing = sorted({*report["missing_keys"], *(str(name) for name, *_ in report["mismatched_keys"])})
    if missing:
        raise ModelError(
            f"{model} lacks {len(missing)} of its weights, or has them in another shape than its config.json says "
            f"({missing[0]}); copy or save the model again."
        )
    use_fast_products(loaded)
    use_lean_forward(loaded)
    return loaded.to(place).eval()


def check_model_directory(model: str | Path) -> None:
    """Raise `ModelError` if `model` is a local directory that lacks a part of a model; hub names pass."""
    path = Path(model)
    if not path.is_dir():
        if path.is_absolute() or str(model).startswith("."):
            raise ModelError(f"{model} is not a directory; give a Hugging Face model directory or a hub name.")
        return
    if not (path / "config.json").is_file():
        raise ModelError(f"{model} has no config.json; give a directory in Hugging Face layout.")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{model} has no *.safetensors weights; save the model with save_pretrained first.")
