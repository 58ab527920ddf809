"""A run that is over in seconds, and whose rewards a random model can move. Also a program: the run as a driver of
its own, which tests may kill: `python -m tests.train.tiny_run SETTINGS.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thornback.contracts import Completion, Prompt

if TYPE_CHECKING:
    from thornback.train import Trainer


def digits(completion: Completion) -> float:
    """Share of the answer's characters that are digits."""
    return sum(c.isdigit() for c in completion.text) / max(len(completion.text), 1)


def vowels(completion: Completion) -> float | None:
    """How many vowels, to 10; says nothing of answers with a 7."""
    if "7" in completion.text:
        return None
    return min(10.0, sum(c in "aeiouAEIOU" for c in completion.text))


vowels.range = (0.0, 10.0)  # type: ignore[attr-defined]
REWARDS = {"digits": digits, "vowels": vowels}


class Lucky:
    """Problems that chance solves: an answer is right if it has the problem's letter in it."""

    name = "lucky"
    system_prompt = None
    rewards = ()

    def prompts(self, split: str) -> Iterator[Prompt]:
        for i, letter in enumerate("abcdefgh" if split == "train" else "mnop"):
            yield Prompt(f"{split}/{i}", ({"role": "user", "content": letter},), letter)

    @classmethod
    def answers(cls) -> dict[str, str]:
        return {p.key: str(p.answer) for p in cls().prompts("train")}

    def is_correct(self, completion: Completion) -> bool:
        return completion.prompt.answer in completion.text


def settings(model_path: Path | str, directory: Path | str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of a tiny run; `sections` go over them, section by section."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(directory), "steps": 8, "timeout_seconds": 120, "seed": 1},
        "model": {"path": str(model_path)},
        "task": {"name": "arithmetic", "options": {"max_digits": 2, "num_train": 12, "num_test": 16}},
        "data": {"prompts_per_step": 4},
        "rollout": {"max_tokens": 12, "samples_per_prompt": 4, "num_threads": 1},
        "algorithm": {"estimator": "dvao"},
        "learner": {"learning_rate": 1e-3, "num_threads": 1},
        "evaluation": {"every": 4, "num_prompts": 16, "num_saved_samples": 4},
        "checkpoint": {"every": 3},
    }
    return {name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}}


# What guesses cost here, so that some are always worth it, on any machine.
COSTS = {"costs": [[1, 1e-3], [256, 1.1e-3]]}


def speculating(model: Path | str, directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of three epochs, of answers that often repeat."""
    directory.mkdir(exist_ok=True)
    (directory / "speculation.json").write_text(json.dumps(COSTS))
    rollout = {"speculate": "rasd", "rasd": {"max_sequences": 64}, "temperature": 0.1, "max_tokens": 16}
    values = settings(model, directory, run={"steps": 8, "save_rollouts": True}, **sections)
    values["rollout"] |= rollout | sections.get("rollout", {})
    return values


def drafted(model: Path | str, directory: Path, head: str) -> dict[str, Any]:
    """A speculating run whose draft head follows the policy; checkpoints lie between two refreshes."""
    rasd = {"draft": head, "draft_refresh_every": 2, "draft_refresh_updates": 4, "draft_learning_rate": 5e-3}
    return speculating(model, directory, rollout={"rasd": {"max_sequences": 64, **rasd}})


def trainer(values: dict[str, Any]) -> Trainer:
    from thornback.train import Trainer  # which a reward model, whose rewards are here, needs not

    return Trainer(values, reward=REWARDS)


def comparable(directory: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what is measured by a clock."""
    rows = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    clocked = ("time", "step_seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in clocked and not k.startswith("phase/")} for row in rows]


def events(directory: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(directory, "events.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    trainer(json.loads(Path(sys.argv[1]).read_text())).train()
