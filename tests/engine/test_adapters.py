"""LoRA by request: one batch under several adapters equals peft's own models, one at a time."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.engine.contract import PROMPTS
from thornback.contracts import EngineConfig, InvalidRequest, ModelError, Request, SamplingParams
from thornback.engine import TorchEngine, generate


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory) -> tuple[tuple[str, str], ...]:
    made = []
    for seed, (name, targets) in enumerate({"ada": ["q_proj", "v_proj"], "bob": ["up_proj", "o_proj"]}.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False))
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        made.append((name, str(directory)))
    return tuple(made)


def test_each_request_runs_under_its_adapter(tiny_model, adapters) -> None:
    engine = TorchEngine(tiny_model("qwen3"), EngineConfig(adapters=adapters, block_size=4, max_model_len=128))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    names = [None, "ada", "bob"]
    requests = [Request(f"{n}{i}", p, params, adapter=n) for i, p in enumerate(PROMPTS) for n in names]
    for _ in range(2):  # the second time from the prefix cache, which must not mix adapters
        samples = generate(engine, requests)
        for name in names:
            model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
            if name:
                model = PeftModel.from_pretrained(model, dict(adapters)[name])
            for i, prompt in enumerate(PROMPTS):
                ids = torch.tensor([prompt])
                wanted = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                    eos_token_id=None,
                )[0, len(prompt) :]  # fmt: skip
                assert samples[f"{name}{i}"][0].token_ids.tolist() == wanted.tolist()


def test_unknown_and_broken_adapters_are_refused(tiny_model, adapters, tmp_path) -> None:
    engine = TorchEngine(tiny_model("qwen3"), EngineConfig(adapters=adapters, max_model_len=64))
    with pytest.raises(InvalidRequest, match="no adapter named eve; loaded: ada, bob"):
        engine.add_request(Request("a", (5,), adapter="eve"))
    with pytest.raises(ModelError, match="adapter_config"):
        TorchEngine(tiny_model("qwen3"), EngineConfig(adapters=(("eve", str(tmp_path)),), max_model_len=64))
