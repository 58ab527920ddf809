"""A draft head learns what its target says, and then saves it passes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from thornback.cli.main import main
from thornback.contracts import EngineConfig, Request, SamplingParams, SpeculationConfig
from thornback.data import load_tokenizer
from thornback.engine import TorchEngine, generate

TEXT = "the cat sat on the mat and then the dog sat on the cat; "


@pytest.fixture(scope="module")
def fluent(tiny_model, ray_cluster, tmp_path_factory):
    """A model that has learned one sentence."""
    from thornback.train.sections import WarmStartSection
    from thornback.train.warm_start import Example, supervise

    base, out = tiny_model("qwen3"), tmp_path_factory.mktemp("fluent") / "model"
    ids = load_tokenizer(base).encode(TEXT * 3, add_special_tokens=False)
    examples = [Example(tuple(ids[i : i + 64]), 1) for i in range(len(TEXT))]
    section = WarmStartSection(steps=60, batch_size=8, learning_rate=5e-3, warmup_steps=5)
    supervise(base, examples, out, section, num_threads=1)
    return out


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": (TEXT * 2)[i : i + 40]}) + "\n" for i in range(len(TEXT))))
    return path


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
