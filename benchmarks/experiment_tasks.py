"""What grids share: the tasks, the models that they start from, and what all their recipes have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.experiments import WarmUp

PROMPTS = 480
QUICK_STEPS = 3
# The model, the task, its two rewards, how it is warmed up, the longest answer, and the learning rates that are tried:
# the best ones of the methods lie within.
TASKS: dict[str, dict[str, Any]] = {
    "arithmetic": {
        "rewards": ("correct", "brevity"),
        "model": {"build": {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}},
        # A worked answer takes about 30 tokens and is more often right than a direct one, which takes 8.
        "task": {"name": "arithmetic", "options": {"num_train": PROMPTS, "budget": 12, "margin": 24}},
        "warm_start": {"steps": 500, "options": {"direct": 0.3, "wrong_column": 0.12}},
        "max_tokens": 48,
        "rates": (2.5e-5, 5e-5, 1e-4, 2e-4),
    },
    "tools": {
        "rewards": ("arguments", "format"),
        "model": {"build": {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}},
        "task": {"name": "tools", "options": {"num_train": PROMPTS, "max_calls": 1, "num_tools": 2}},
        "warm_start": {"steps": 500},
        "max_tokens": 48,
        "rates": (1e-4, 2e-4, 4e-4, 8e-4),
    },
    "multihop": {
        # An answer wants two searches, and each costs.
        "rewards": ("answer", "frugality"),
        "model": {"build": {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 168}},
        "task": {"name": "multihop", "options": {"num_train": PROMPTS, "top_k": 2, "max_hops": 2}},
        "warm_start": {
            "steps": 1200,
            "environment_weight": 1.0,
            "options": {"wrong_name": 0.04, "wrong_relation": 0.04},
        },
        "max_tokens": 128,
        "rates": (2e-4, 4e-4, 8e-4),
    },
}


def start(task: str, seed: int, quick: bool, times: int = 1) -> WarmUp:
    """A model that is warmed up on `task`, `times` as long as its warm start says."""
    of = TASKS[task]
    steps = times * (60 if quick else of["warm_start"]["steps"])
    warm = {**of["warm_start"], "steps": steps, "learning_rate": 3e-3, "num_workers": 2}
    return WarmUp(task, {"model": of["model"], "task": of["task"], "warm_start": warm, "run": {"seed": seed}})


def recipe(
    task: str, seed: int, steps: int, learning_rate: float, samples: int, /, *, evaluations: int, **sections: Any
) -> dict[str, Any]:
    """Settings of a run of so many steps, with `samples` rollouts a prompt and so many evaluations after the first;
    `sections` tell how it learns, and may replace any other."""
    of = TASKS[task]
    longest = of["max_tokens"]
    return {
        "run": {"steps": steps, "seed": seed},
        "task": of["task"],
        "data": {"prompts_per_step": 8},
        "rollout": {
            "samples_per_prompt": samples,
            "max_tokens": longest,
            "num_threads": 1,
            "engine_options": {"max_model_len": longest + 96},
        },
        "learner": {"learning_rate": learning_rate, "num_threads": 1},
        "evaluation": {"every": max(1, steps // evaluations), "num_prompts": 256 if steps > QUICK_STEPS else 32},
        **sections,
    }


def rates_of(tasks: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """The learning rates that are tried, by task."""
    return {task: TASKS[task]["rates"] for task in tasks}
