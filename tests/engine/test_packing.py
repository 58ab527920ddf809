"""Packed log-probabilities and their gradients equal those of one plain sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from thornback.engine import load_model, packing, sequence_logprobs

RNG = np.random.default_rng(5)


def ids(count: int) -> list[int]:
    return [int(t) for t in RNG.integers(4, 118, size=count)]


SHARED = ids(20)
SEQUENCES = [ids(3), [*SHARED, *ids(9)], [*SHARED, *ids(40)], [*SHARED, *ids(1)], ids(70), ids(33), ids(2)]
STARTS = [1, 20, 20, 20, 30, 8, 1]


def plain(model, temperature: float) -> torch.Tensor:
    parts = []
    for sequence, start in zip(SEQUENCES, STARTS, strict=True):
        scores = (model(torch.tensor([sequence])).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
        parts.append(scores.gather(1, torch.tensor(sequence[start:])[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("chunked", [False, True])
def test_values_and_gradients(tiny_model, architecture, chunked, monkeypatch) -> None:
    if chunked:  # as for a large vocabulary
        monkeypatch.setattr(packing, "_LOGIT_ROWS", 128 * 10)
    directory = tiny_model(architecture)
    ours = load_model(directory, dtype="float64")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    got, entropy = sequence_logprobs(ours, SEQUENCES, STARTS, temperature=0.8, with_entropy=True)
    wanted = plain(theirs, 0.8)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=0)
    assert entropy.shape == got.shape
    assert (entropy > 0).all()
    weights = torch.linspace(-1, 1, len(got))
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_neighbours_with_one_prompt_share_its_tokens(tiny_model, monkeypatch) -> None:
    seen = []
    model = load_model(tiny_model("qwen3"))
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(kw["input_ids"].shape[1]) or original(**kw))
    sequence_logprobs(model, SEQUENCES[1:4], STARTS[1:4])
    assert seen == [20 + 9 + 40 + 1]


def test_a_response_needs_a_token_before_it(tiny_model) -> None:
    model = load_model(tiny_model("qwen3"))
    for start in (0, 3):
        with pytest.raises(ValueError, match="starts at"):
            sequence_logprobs(model, [[5, 6, 7]], [start])


def test_a_sliding_window_is_respected(tmp_path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.engine.reference import Reference
    from thornback.contracts import EngineConfig, Request, SamplingParams
    from thornback.engine import TorchEngine, generate

    config = Qwen2Config(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, use_sliding_window=True, sliding_window=8, max_window_layers=0, eos_token_id=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    reference = Reference(tmp_path)
    model = load_model(tmp_path)
    assert "sliding_attention" in model.config.layer_types
    got = sequence_logprobs(model, SEQUENCES, STARTS)[0].double()
    torch.testing.assert_close(got, plain(reference.model.double(), 1.0), atol=1e-4, rtol=0)
    reference.model.float()
    prompt = tuple(SEQUENCES[4])
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine = TorchEngine(tmp_path, EngineConfig(block_size=4, max_num_batched_tokens=16, max_model_len=128))
    tokens = generate(engine, [Request("a", prompt, params)])["a"][0].token_ids.tolist()
    reference.assert_same(prompt, tokens, reference.greedy(prompt, 12), params)
