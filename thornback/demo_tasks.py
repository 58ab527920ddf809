"""What there is to show: for each task the settings of its run, what its model is asked, and what counts as better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thornback.data import load_task

if TYPE_CHECKING:
    from openai import OpenAI

    from thornback.train.config import RunConfig

# Two workers and two ranks of one thread each: so small a model's products are too short to share between threads.
_COMMON: dict[str, dict[str, Any]] = {
    "rollout": {"samples_per_prompt": 8, "num_workers": 2, "num_threads": 1},
    "algorithm": {"estimator": "anchored_dvao", "kl_weight": 1e-3},
    "learner": {
        "num_ranks": 2,
        "num_threads": 1,
        "learning_rate": 2e-4,
        "schedule": "linear",
        "final_learning_rate_share": 0.1,
    },
    "anchors": {"num_rollouts": 8},
    "evaluation": {"every": 40, "num_prompts": 512},
    "checkpoint": {"every": 20},
}


@dataclass(frozen=True)
class Demo:
    """`settings` of the run; `ask` yields lines of a talk with the served model; sampled accuracy must rise from at
    least `least_before` by `gain`, and to `factor` times what it was; no other figure may fall by more than
    `loss_allowed`."""

    settings: Mapping[str, Any]
    ask: Callable[[OpenAI, str, RunConfig], Iterator[str]]
    least_before: float = 0.0
    gain: float = 0.20
    factor: float = 1.0
    loss_allowed: float = 0.02


def _answer(client: OpenAI, model: str, messages: list[dict[str, str]], max_tokens: int) -> str:
    """The model's next turn, greedily."""
    answer = client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=max_tokens,
    )
    return answer.choices[0].message.content or ""


def ask_sums(client: OpenAI, model: str, config: RunConfig) -> Iterator[str]:
    """Some sums and what it makes of them."""
    for question in ("47+38=?", "265+117=?", "804+96=?"):
        yield f"{question:<10} {_answer(client, model, [{'role': 'user', 'content': question}], 64)}"


def ask_agent(client: OpenAI, model: str, config: RunConfig) -> Iterator[str]:
    """Held-out questions: its searches, what they find, and its answers."""
    task: Any = load_task(config.task.name, config.task.options)
    for prompt, _ in zip(task.prompts("test"), range(3), strict=False):
        messages, environment = [dict(m) for m in prompt.messages], task.environment(prompt, 0)
        yield f"{messages[0]['content']}  (it is {prompt.answer})"
        for _ in range(task.max_turns):
            turn = _answer(client, model, messages, 64)
            yield f"    {turn}"
            replies = [dict(reply) for reply in environment.step(turn).messages]
            if not replies:
                break
            yield from (f"        {line}" for reply in replies for line in reply["content"].split("\n"))
            messages += [{"role": "assistant", "content": turn}, *replies]


DEMOS = {
    # A warm start from demonstrations as flawed as these stands at 30 to 55% sampled and 90% greedy: room to improve.
    "arithmetic": Demo(
        {
            **_COMMON,
            "model": {"build": {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}},
            "run": {"steps": 100},
            "task": {
                "name": "arithmetic",
                "options": {"min_digits": 2, "max_digits": 3, "num_train": 1024, "num_test": 512, "budget": 34},
            },
            "data": {"prompts_per_step": 16},
            "rollout": {**_COMMON["rollout"], "max_tokens": 64, "engine_options": {"max_model_len": 128}},
            "warm_start": {
                "steps": 800,
                "batch_size": 32,
                "learning_rate": 3e-3,
                "num_workers": 2,
                "options": {"direct": 0.3, "wrong_column": 0.12},
            },
        },
        ask_sums,
    ),
    "multihop": Demo(
        {
            **_COMMON,
            "model": {"build": {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 168}},
            "run": {"steps": 100},
            "task": {
                "name": "multihop",
                "options": {"num_people": 96, "top_k": 2, "max_hops": 3, "num_train": 1024, "num_test": 512},
            },
            "data": {"prompts_per_step": 16},
            "rollout": {**_COMMON["rollout"], "max_tokens": 256, "engine_options": {"max_model_len": 320}},
            "warm_start": {
                "steps": 1500,
                "batch_size": 32,
                "learning_rate": 3e-3,
                "num_workers": 2,
                "environment_weight": 1.0,
                "options": {"wrong_name": 0.04, "wrong_relation": 0.04},
            },
        },
        ask_agent,
        least_before=0.2,
        factor=2.0,
    ),
}
