"""What the benchmarks count is what they say: operations, parameters, prompts, mapped bytes, ratios."""

from __future__ import annotations

import json
import mmap

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import rasd_batches, rl_step, rollout
from benchmarks.arithmetic import Arithmetic
from benchmarks.harness import Peer, Turns
from benchmarks.models import VOCABULARY, benchmark_model
from benchmarks.peers.thornback_weights import distinct_bytes, mapped_regions
from benchmarks.problems import Problems, digits, variety
from benchmarks.results import Results
from benchmarks.workload import Workload
from thornback.data import render_prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return benchmark_model(tmp_path_factory.mktemp("models"), "0.1M")


@pytest.mark.parametrize(("size", "parameters"), [("0.1M", 0.1e6), ("3.7M", 3.7e6)])
def test_models_have_the_parameters_that_their_names_say(tmp_path, size, parameters) -> None:
    network = AutoModelForCausalLM.from_pretrained(benchmark_model(tmp_path, size))
    assert abs(sum(p.numel() for p in network.parameters()) / parameters - 1) < 0.05
    assert network.generation_config.eos_token_id is None  # completions end at their limit only


def test_operations_are_those_of_the_model(model) -> None:
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    length = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    # Plain attention multiplies with all keys, future ones too; so each token has `length` of them here.
    assert Arithmetic.of(model).forward(length, length, context=length) == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )


def test_a_step_counts_prompts_once_for_their_samples(model) -> None:
    arithmetic = Arithmetic.of(model)
    one = arithmetic.step(prompts=1, samples=1, prompt_tokens=26, new_tokens=4)
    four = arithmetic.step(prompts=1, samples=4, prompt_tokens=26, new_tokens=4)
    answers = 4 * arithmetic.forward(4, 4, 26 + 2)
    assert four - one == pytest.approx(3 * answers)


def test_every_prompt_has_the_length_that_the_step_assumes_and_every_token_a_text(model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = {len(render_prompt(tokenizer, p.messages)) for p in Problems().prompts("train")}
    assert lengths == {rl_step.PROMPT_TOKENS}
    assert len(tokenizer) == VOCABULARY
    assert all(0.0 <= reward(text) <= 1.0 for reward in (digits, variety) for text in ("", "12ab", "x" * 500))


def test_prompts_share_prefixes_within_a_turn_and_nothing_between_turns() -> None:
    work = Workload()
    prompts = work.prompts(3)
    assert prompts == work.prompts(3)
    prefixes = {tuple(p[: work.prefix_length]) for p in prompts}
    assert (len(prompts), len(prefixes), len(set(map(tuple, prompts)))) == (64, 8, 64)
    assert not prefixes & {tuple(p[: work.prefix_length]) for p in work.prompts(4)}
    assert Workload(**work.settings()) == work


def test_mapped_memory_counts_once_however_often_it_is_mapped(tmp_path) -> None:
    ranges = [("8:1", "7", 0, 100), ("8:1", "7", 50, 150), ("8:1", "7", 50, 150), ("8:1", "9", 0, 10)]
    assert distinct_bytes(ranges) == 160
    path = tmp_path / "buffer"
    path.write_bytes(bytes(1 << 16))
    with open(path, "r+b") as file:
        maps = [mmap.mmap(file.fileno(), 1 << 16) for _ in range(2)]
    addresses = [np.frombuffer(m, np.uint8).ctypes.data + 128 for m in maps]
    regions = list(mapped_regions())
    found = [next(r.file_range(a, 64) for r in regions if r.is_shared and r.holds(a)) for a in addresses]
    assert addresses[0] != addresses[1]
    assert found[0] == found[1]
    assert found[0][2:] == (128, 192)


def test_ratios_compare_with_the_fastest_vllm() -> None:
    seconds = {"thornback": 1.0, "transformers generate": 2.0, "vllm eager": 4.0, "vllm compiled": 1.5}
    turns = {n: Turns(Peer(n, ""), [{"seconds": s, "tokens": 100}] * 3) for n, s in seconds.items()}
    found = rollout.results(turns, threads=2)
    assert found.ratios == {"vs_hf_generate": 2.0, "vs_vllm": 1.5}
    assert [row["tokens_per_second"] for row in found.rows][:2] == [100.0, 50.0]


def test_the_document_names_machine_versions_and_command() -> None:
    document = json.loads(json.dumps(Results("x", [{"name": "a"}], {"r": 1.0}).to_json(True, "python -m benchmarks.x")))
    assert {"benchmark", "machine", "versions", "rows", "ratios", "command"} <= set(document)
    assert document["machine"]["cores"] >= 1
    assert document["versions"]["torch"] == torch.__version__


def test_bounds_of_a_batch_hold_its_mean_and_widen_with_noise(tmp_path) -> None:
    rng, size = np.random.default_rng(0), 4

    def turns(name: str, speed: float, noise: float) -> Turns:
        seconds = np.exp(rng.normal(0, noise, rasd_batches.ROUNDS)) / speed
        return Turns(Peer(name, ""), [{"tokens 4": 100.0, "seconds 4": s} for s in seconds])

    every = {
        rasd_batches.PLAIN: turns("plain", 1.0, 0.001),
        rasd_batches.RASD: turns("rasd", 1.5, 0.001),
        rasd_batches.AGAIN: turns("plain again", 1.0, 0.2),
    }
    rows = [rasd_batches.row(name, size, every) for name in (rasd_batches.RASD, rasd_batches.AGAIN)]
    assert 1.49 < rows[0]["lower_95"] < rows[0]["over_plain"] < rows[0]["upper_95"] < 1.51
    assert rows[1]["upper_95"] - rows[1]["lower_95"] > 0.1
    rasd_batches.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
