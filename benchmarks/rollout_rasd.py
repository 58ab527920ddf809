"""Rollouts guessed from earlier ones: a training run like the demo's, its epochs' rollouts again, plain and with RASD.

The run trains for some epochs (benchmarks.epochs says how it differs from the demo). Then the same rollouts are drawn
again, from the same seeds under the policy that began the epoch, by one rollout worker of one thread, as the demo's
are: the workers guess from the reference rollouts and all earlier epochs', as in training, while at most 8 sequences
live. Both draw the same tokens, which is checked.

`speedup_N_live`: plain seconds over guessed ones, of rollouts of which N live at any time, all epochs from the second
on together; `speedup`: the geometric mean over 1, 2, 4 and 8. `speedup_phase`: of 64 rollouts of an epoch that begin at
once, whose lengths are as near as the epoch has them to the quantiles of a Pareto distribution from 8 to 64 tokens
(mean 14; an eighth are longer than 19). Both are the demo's own model's; `..._LAYERS_layers` are those of the same
model with layers added that change nothing (their outputs are multiplied by 0), so that it says the same and a pass
takes longer, as a larger model's does.

The picture beside the JSON shows, over the epochs, how many of the tokens were guessed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np

from benchmarks.epochs import long_tailed, rollout_files, singles, train_epochs
from benchmarks.harness import QUICK_ROUNDS, ROUNDS, Peer, Turns, alternate
from benchmarks.models import deepened, num_parameters
from benchmarks.results import Results, run
from thornback.data import read_rollouts
from thornback.engine import ACTOR_ENVIRONMENT
from thornback.train.speculation import REFERENCE

PLAIN, RASD = "plain", "rasd"
DEMO_LAYERS, MORE_LAYERS = 4, 64
LIVE = (1, 2, 4, 8)
PHASE = 64
OPTIONS = {"num_nodes": 32, "max_sequences": max(LIVE)}  # the defaults of rollout.rasd
THREADS = 1


def peers(directory: Path, policies: list[str], steps_per_epoch: int) -> list[Peer]:
    """The two workers, and what they answer: of each epoch the first step, or as much of it as keeps so many alive;
    and a phase."""
    files = [rollout_files(directory, epoch, steps_per_epoch) for epoch in range(len(policies))]
    epochs = []
    for epoch, policy in enumerate(policies):
        step = read_rollouts(files[epoch][0])
        shards = {str(n): singles(step, epoch, range(len(step) * n // max(LIVE))) for n in LIVE}
        epochs.append(
            {
                "policy": policy,
                "reference": str(directory / REFERENCE),
                "earlier": [file for earlier in files[:epoch] for file in earlier],
                "shards": shards | {str(PHASE): long_tailed(files[epoch], epoch, PHASE)},
            }
        )
    settings: dict[str, Any] = {"epochs": epochs, "threads": THREADS, "options": OPTIONS}
    target = "benchmarks.peers.thornback_rollouts:rollouts"
    return [
        Peer(name, target, {**settings, "guess": name == RASD, "out": f"{policies[0]}-{name}.npy"}, ACTOR_ENVIRONMENT)
        for name in (PLAIN, RASD)
    ]


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    results = Results("rollout_rasd")
    num_epochs, steps_per_epoch = (3, 2) if quick else (5, 8)
    sizes = {"prompts_per_step": 16, "steps_per_epoch": steps_per_epoch, "warm_steps": 200 if quick else 800}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        say(f"training for {num_epochs} epochs of {steps_per_epoch} steps")
        policies = train_epochs(directory, num_epochs, **sizes)
        for layers in (DEMO_LAYERS, MORE_LAYERS):
            say(f"the model with {layers} layers")
            models = [str(deepened(policy, layers)) for policy in policies]
            both = peers(directory, models, steps_per_epoch)
            turns = alternate(both, QUICK_ROUNDS if quick else ROUNDS, say=say)
            check_same_tokens(both)
            add(results, turns, layers, num_parameters(models[0]), num_epochs)
    results.plot = lambda path: draw(results.rows, path)
    return results


def check_same_tokens(both: list[Peer]) -> None:
    plain, guessed = (np.load(peer.settings["out"]) for peer in both)
    if not np.array_equal(plain, guessed):
        raise RuntimeError("Guessed rollouts are not the plain ones: the benchmark would compare different work.")


def add(results: Results, turns: dict[str, Turns], layers: int, parameters: int, num_epochs: int) -> None:
    """One model's rows and ratios."""
    suffix = "" if layers == DEMO_LAYERS else f"_{layers}_layers"
    for live in (*LIVE, PHASE):
        what, parts = kind(live), [f"{live}_{epoch}" for epoch in range(1, num_epochs)]
        for name, t in turns.items():
            seconds = [sum(turn[f"seconds_{part}"] for part in parts) for turn in t.values]
            tokens = sum(t.median(f"tokens_{part}") for part in parts)
            row = {
                "name": f"{name}, {what}",
                "layers": layers,
                "parameters": parameters,
                "threads": THREADS,
                "tokens": int(tokens),
                "seconds": float(np.median(seconds)),
                "tokens_per_second": tokens / float(np.median(seconds)),
                "accepted_share": accepted_share(t, parts),
                "turns": seconds,
            }
            results.rows.append(row)
    by_name = {row["name"]: row for row in results.rows if row["layers"] == layers}

    def speedup(live: int) -> float:
        return by_name[f"{PLAIN}, {kind(live)}"]["seconds"] / by_name[f"{RASD}, {kind(live)}"]["seconds"]

    results.ratios |= {
        f"speedup{suffix}": geometric_mean(map(speedup, LIVE)),
        **{f"speedup_{live}_live{suffix}": speedup(live) for live in LIVE},
        f"speedup_phase{suffix}": speedup(PHASE),
    }
    for epoch in range(num_epochs):
        shares = {f"{live}_live": accepted_share(turns[RASD], [f"{live}_{epoch}"]) for live in LIVE}
        results.rows.append({"epoch": epoch + 1, "layers": layers, "accepted_share": shares})


def kind(live: int) -> str:
    return f"phase of {PHASE}" if live == PHASE else f"{live} live"


def accepted_share(turns: Turns, parts: list[str]) -> float:
    """Which share of the tokens was guessed."""
    accepted = sum(turns.values[0].get(f"accepted_{part}", 0.0) for part in parts)
    return accepted / sum(turns.values[0][f"tokens_{part}"] for part in parts)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The share of guessed tokens over the epochs, of the demo's model, by how many sequences live."""
    from matplotlib.figure import Figure

    epochs = [row for row in rows if "epoch" in row and row["layers"] == DEMO_LAYERS]
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for live in LIVE:
        shares = [row["accepted_share"][f"{live}_live"] for row in epochs]
        axes.plot([row["epoch"] for row in epochs], shares, marker="o", label=f"{live} live")
    axes.set(xlabel="epoch", ylabel="guessed tokens, share", ylim=(0, 1), xticks=[row["epoch"] for row in epochs])
    axes.legend(frameon=False, ncols=len(LIVE), loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run("rollout_rasd", measure)
