"""A draft head learns what its target says, and then saves it passes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from thornback.cli.main import main
from thornback.contracts import EngineConfig, Request, SamplingParams, SpeculationConfig
from thornback.data import load_tokenizer
from thornback.engine import TorchEngine, generate, load_model, sequence_logprobs
from thornback.train.fitting import batch_of, rate_share

TEXT = "the cat sat on the mat and then the dog sat on the cat; "

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def fluent(tiny_model, tmp_path_factory):
    """A model that has learned one sentence, as a warm start would teach it: in this process that is a second."""
    base, out = tiny_model("qwen3"), tmp_path_factory.mktemp("fluent") / "model"
    tokenizer = load_tokenizer(base)
    ids = np.array(tokenizer.encode(TEXT * 3, add_special_tokens=False))
    model, steps = load_model(base, dtype="float32").train(), 60
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        starts = batch_of(step, len(TEXT), 8, seed=0)
        logprobs, _ = sequence_logprobs(model, [ids[i : i + 64] for i in starts], [1] * len(starts))
        (-logprobs.mean()).backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * rate_share(step, steps, warmup_steps=5)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": (TEXT * 2)[i : i + 40]}) + "\n" for i in range(len(TEXT))))
    return path


@pytest.mark.full
def test_thornback_draft(fluent, documents, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "head"
    monkeypatch.chdir(tmp_path)  # relative paths are what people type
    fluent = Path(os.path.relpath(fluent))
    flags = "--prompt-tokens 12 --max-tokens 40 --steps 40 --batch-size 8 --learning-rate 3e-3 --threads 1"
    assert main(["draft", str(fluent), "head", str(documents), *flags.split()]) == 0
    assert "first choice" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "head-metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40
    assert lines[-1]["agreement"][0] > 0.5
    prompt = tuple(load_tokenizer(fluent).encode(TEXT[:20], add_special_tokens=False))
    requests = [Request("a", prompt, SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))]
    speculation = SpeculationConfig(num_nodes=12, adaptive=False, draft=str(out), draft_depth=4, draft_top_k=3)
    engine = TorchEngine(fluent, EngineConfig(num_threads=1, speculation=speculation))
    fast, plain = generate(engine, requests), generate(TorchEngine(fluent, EngineConfig(num_threads=1)), requests)
    assert fast["a"][0].token_ids.tolist() == plain["a"][0].token_ids.tolist()
    stats = engine.speculation.stats
    assert stats.num_accepted_tokens > stats.num_drafts  # more than two tokens a pass


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--column", "words"], 'no column "words"'),
    ],
)
def test_what_is_wrong_is_said(fluent, documents, tmp_path, capsys, flags, said) -> None:
    assert main(["draft", str(fluent), str(tmp_path / "head"), str(documents), *flags]) == 2
    assert said in capsys.readouterr().err


def test_too_little_to_learn_from(fluent, tmp_path, capsys) -> None:
    (tmp_path / "short.txt").write_text("the")
    arguments = ["draft", str(fluent), str(tmp_path / "head"), str(tmp_path / "short.txt"), "--max-tokens", "0"]
    assert main(arguments) == 2
    assert "give hundreds" in capsys.readouterr().err
