"""Speculation at batch 1 on four tasks of real text (see real_text.py), a target of 12 layers and a draft of one.

Two measurements. With trees of a fixed size, the same for every source: tokens emitted per pass that decodes, the
bonus token included; a prompt's own pass, which is the same for all, is not (`accept_vs_best_single`: RASD's average
over the tasks over that of the best single source; `accept_worst_task`: the least of RASD's over the task's best). And
with trees sized to the machine, as an engine does by itself: tokens per second, prompts included (`speed_vs_plain`,
`speed_vs_best_single`: geometric means over the tasks), beside vLLM with its `ngram` and `suffix` methods and
`transformers` with its prompt lookup on the same target (`speedup_vs_vllm_suffix`, `speedup_vs_vllm_ngram`: our
speed-up over our plain decoding over theirs over their own).

vLLM verifies chains. With proposals of one length at most, however unlikely, RASD's under vLLM (`--engine vllm`, which
asks no draft head) against its `suffix`: tokens emitted per pass, the average over the tasks over theirs, the worse of
`LENGTHS` (`vllm_accept_vs_suffix`); and, sized as either does by itself, tokens per second (`vllm_speed_vs_suffix`).

Every source's text is plain decoding's: checked in every turn. The models are made by
`python -m benchmarks.speculation_models`, once, if they are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from statistics import geometric_mean, mean
from typing import Any

from benchmarks import real_text, speculation_models
from benchmarks.harness import QUICK_ROUNDS, ROUNDS, Peer, PeerFailed, Turns, alternate
from benchmarks.models import cores
from benchmarks.peers import vllm_generate
from benchmarks.peers.speculation import SOURCES
from benchmarks.results import Results, run
from thornback.engine import ACTOR_ENVIRONMENT

NODES, MOST_NODES = 60, 32  # of trees of a fixed size (EAGLE-2's), and at most of those that an engine sizes
NEW_TOKENS = 96
LENGTHS = (8, 24)  # of proposals under vLLM; 24 is its suffix's own
PROPOSED = 8  # tokens that vLLM's and transformers' methods propose; theirs are chains
SINGLE = ("prompt lookup", "retrieval", "draft")


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    models = {
        "model": str(speculation_models.target(say)),
        "draft": str(speculation_models.draft(say)),
        "datastore": str(speculation_models.datastore(say)),
    }
    per_turn, rounds = (1, QUICK_ROUNDS) if quick else (4, ROUNDS)
    count = per_turn * (rounds + 2)
    work = {
        "prompts": {task: [e.prompt for e in real_text.examples(task, True)[:count]] for task in real_text.TASKS},
        "per_turn": per_turn,
        "new_tokens": 32 if quick else NEW_TOKENS,
    }
    several = 1 if quick else 3
    fixed = alternate(_ours(models, work, NODES, adaptive=False), several, say=say)
    chains = alternate(_chains(models, work), several, say=say) if find_spec("arctic_inference") else {}
    under_vllm = _under_vllm(models, work, MOST_NODES, adaptive=True)
    free = [*_ours(models, work, MOST_NODES, adaptive=True), *_theirs(models, work), under_vllm]
    return results(fixed, chains, alternate(free, rounds, 2, say=say))


def _ours(models: Mapping[str, str], work: Mapping[str, Any], num_nodes: int, adaptive: bool) -> list[Peer]:
    settings = {**models, **work, "num_nodes": num_nodes, "adaptive": adaptive, "threads": cores()}
    target = "benchmarks.peers.speculation:thornback"
    return [Peer(name, target, {**settings, "source": name}, ACTOR_ENVIRONMENT) for name in SOURCES]


def _under_vllm(models: Mapping[str, str], work: Mapping[str, Any], num_nodes: int, adaptive: bool) -> Peer:
    settings = {**models, **work, "num_nodes": num_nodes, "adaptive": adaptive, "threads": cores()}
    named = "vllm rasd" if adaptive else _chain("rasd", num_nodes)
    made = {**settings, "source": "rasd", "engine": "vllm"}
    return Peer(named, "benchmarks.peers.speculation:thornback", made, ACTOR_ENVIRONMENT)


def _chains(models: Mapping[str, str], work: Mapping[str, Any]) -> list[Peer]:
    """Proposals of fixed lengths under vLLM, and vLLM without any."""
    target, settings = "benchmarks.peers.speculation:vllm", {"model": models["model"], **work}
    environment = vllm_generate.environment(cores(), intel_openmp=True)
    methods: dict[str, dict[str, Any] | None] = {"vllm": None}
    for length in LENGTHS:
        without_limits = {"suffix_decoding_max_spec_factor": 1000.0, "suffix_decoding_min_token_prob": 0.0}
        methods[_chain("suffix", length)] = {"method": "suffix", "num_speculative_tokens": length, **without_limits}
    return [
        *(Peer(name, target, {**settings, "method": method}, environment) for name, method in methods.items()),
        *(_under_vllm(models, work, length, adaptive=False) for length in LENGTHS),
    ]


def _chain(method: str, length: int) -> str:
    return f"vllm {method}, {length}"


def _theirs(models: Mapping[str, str], work: Mapping[str, Any]) -> list[Peer]:
    settings, environment = {"model": models["model"], **work}, vllm_generate.environment(cores(), intel_openmp=True)
    ngram = {"method": "ngram", "num_speculative_tokens": PROPOSED, "prompt_lookup_max": 16, "prompt_lookup_min": 2}
    methods: dict[str, dict[str, Any] | None] = {"vllm": None, "vllm ngram": ngram}
    if find_spec("arctic_inference"):
        methods["vllm suffix"] = {"method": "suffix"}
    plain = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None, "OMP_NUM_THREADS": str(cores())}
    hf = {**settings, "threads": cores()}
    return [
        *(
            Peer(name, "benchmarks.peers.speculation:vllm", {**settings, "method": method}, environment)
            for name, method in methods.items()
        ),
        Peer("transformers", "benchmarks.peers.speculation:transformers", {**hf, "lookup": None}, plain),
        Peer("transformers lookup", "benchmarks.peers.speculation:transformers", {**hf, "lookup": PROPOSED}, plain),
    ]


def results(fixed: Mapping[str, Turns], chains: Mapping[str, Turns], free: Mapping[str, Turns]) -> Results:
    for turns in (fixed, free):
        _check_texts(turns, "plain", SOURCES)
    for turns in (chains, free):
        _check_texts(turns, "vllm", [name for name in turns if name.startswith("vllm rasd")])
    per_pass = {name: _ratio(turns, "decoded", "passes") for name, turns in fixed.items()}
    speed = {name: _ratio(turns, "tokens", "seconds") for name, turns in free.items()}
    rows = [_row(name, f"trees of {NODES}", turns, per_pass[name]) for name, turns in fixed.items()]
    chained = {name: _ratio(turns, "decoded", "passes") for name, turns in chains.items()}
    rows += [_row(name, "chains", turns, chained[name]) for name, turns in chains.items()]
    rows += [_row(name, f"sized, at most {MOST_NODES}", turns, None) for name, turns in free.items()]
    return Results("rasd", rows, {**_acceptance(per_pass), **_under_vllm_acceptance(chained), **_speeds(speed)})


def _acceptance(per_pass: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    ours = per_pass["rasd"]
    best = max(mean(per_pass[name].values()) for name in SINGLE)
    worst = min(ours[task] / max(per_pass[name][task] for name in SINGLE) for task in ours)
    return {"accept_vs_best_single": mean(ours.values()) / best, "accept_worst_task": worst}


def _under_vllm_acceptance(per_pass: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    if not per_pass:
        return {}

    def average(method: str, length: int) -> float:
        return mean(per_pass[_chain(method, length)].values())

    return {"vllm_accept_vs_suffix": min(average("rasd", n) / average("suffix", n) for n in LENGTHS)}


def _speeds(speed: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    def over(name: str, other: str) -> float:
        return geometric_mean(speed[name][task] / speed[other][task] for task in speed[name])

    ours, methods = over("rasd", "plain"), [m for m in ("ngram", "suffix") if f"vllm {m}" in speed]
    return {
        "speed_vs_plain": ours,
        "speed_vs_best_single": min(over("rasd", name) for name in SINGLE),
        **{f"speedup_vs_vllm_{method}": ours / over(f"vllm {method}", "vllm") for method in methods},
        **({"vllm_speed_vs_suffix": over("vllm rasd", "vllm suffix")} if "suffix" in methods else {}),
        "speedup_vs_transformers_lookup": ours / over("transformers lookup", "transformers"),
    }


def _ratio(turns: Turns, above: str, below: str) -> dict[str, float]:
    """Of each task, over all turns."""
    return {t: sum(turns.all(f"{t} {above}")) / sum(turns.all(f"{t} {below}")) for t in real_text.TASKS}


def _check_texts(turns: Mapping[str, Turns], plain: str, others: Iterable[str]) -> None:
    for name in others:
        for task in real_text.TASKS:
            if turns[name].all(f"{task} checksum") != turns[plain].all(f"{task} checksum"):
                raise PeerFailed(f"{name} changed what the target says to prompts of {task}.")


def _row(name: str, trees: str, turns: Turns, per_pass: Mapping[str, float] | None) -> dict[str, Any]:
    def total(what: str) -> float:
        return sum(sum(turns.all(f"{task} {what}")) for task in real_text.TASKS)

    row: dict[str, Any] = {"name": name, "trees": trees, "threads": cores()}
    if per_pass is not None:
        row |= {f"{task}_tokens_per_pass": value for task, value in per_pass.items()}
    row |= {f"{task}_tokens_per_second": value for task, value in _ratio(turns, "tokens", "seconds").items()}
    if name in SOURCES:
        row |= {
            "tokens_per_pass": total("decoded") / total("passes"),
            "nodes_per_pass": total("nodes") / total("passes"),
            "drafting_share": total("drafting") / total("seconds"),
            "retrieval_share": total("retrieval") / total("seconds"),
        }
    return row


if __name__ == "__main__":
    run("rasd", measure)
