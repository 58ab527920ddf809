"""The random models that benchmarks run on: Qwen3 with 2,048 tokens, each of which has a text."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

VOCABULARY = 2048
# Parameters in millions, and build_model's options.
SIZES = {
    "0.1M": {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64},
    "3.7M": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768},
    "10M": {"hidden_size": 384, "num_hidden_layers": 5, "num_attention_heads": 6, "intermediate_size": 1152},
    "100M": {"hidden_size": 768, "num_hidden_layers": 14, "num_attention_heads": 12, "intermediate_size": 2304},
}
KEY_VALUE_HEADS = {"10M": 3, "100M": 6}


def benchmark_model(directory: Path, size: str) -> str:
    """Write the model of this size; returns its path. It has no end-of-sequence token, so that every completion
    is as long as it may be; the tokenizer has one, since trainers ask for it."""
    from thornback.data.tokenizer import character_tokenizer
    from thornback.train.build import build_model

    plain = len(character_tokenizer())
    tokenizer = character_tokenizer([f"<{i:04d}>" for i in range(VOCABULARY - plain)])
    target = directory / size
    build_model(
        target,
        tokenizer,
        vocab_size=VOCABULARY,
        num_key_value_heads=KEY_VALUE_HEADS.get(size, 2),
        **SIZES[size],  # type: ignore[arg-type]
    )
    for name in ("config.json", "generation_config.json"):
        path = target / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}, indent=2))
    return str(target)


def cores() -> int:
    """Both of two, all of many: what every phase of every peer may use."""
    return len(os.sched_getaffinity(0))


def deepened(model: Path, num_layers: int) -> Path:
    """A copy of a model directory with so many layers, those added last: they compute as much as the others, and what
    they compute is multiplied by 0, so that the model says what it said."""
    import torch
    from transformers import AutoModelForCausalLM

    target = model.with_name(f"{model.name}-{num_layers}-layers")
    shutil.copytree(model, target)
    network = AutoModelForCausalLM.from_pretrained(model)
    layers = network.model.layers
    for number in range(len(layers), num_layers):
        layers.append(copy.deepcopy(layers[0]))
        layers[number].self_attn.layer_idx = number
        with torch.no_grad():
            layers[number].self_attn.o_proj.weight.zero_()
            layers[number].mlp.down_proj.weight.zero_()
    network.config.num_hidden_layers = num_layers
    if getattr(network.config, "layer_types", None):
        network.config.layer_types = [network.config.layer_types[0]] * num_layers
    network.save_pretrained(target)
    return target


def num_parameters(model: str) -> int:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model).num_parameters()
