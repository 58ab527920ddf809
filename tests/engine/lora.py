"""LoRA adapters for tests, and what peft's own models answer with them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = {"ada": ["q_proj", "v_proj"], "bob": ["up_proj", "o_proj"]}


def make_adapters(model: Path, directory: Path) -> tuple[tuple[str, str], ...]:
    """Random ones by name, in peft's layout."""
    made = []
    for seed, (name, targets) in enumerate(TARGETS.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(directory / name)
        made.append((name, str(directory / name)))
    return tuple(made)


def greedy(model: Path, adapter: str | None, prompt: tuple[int, ...], count: int) -> list[int]:
    plain = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(plain, adapter) if adapter else plain
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()
