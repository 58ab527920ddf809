"""Imperfect episodes of searching and answering, for the warm start: right enough to learn from, with room left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thornback.contracts import Message
from thornback.data.demonstrations import Demonstration
from thornback.data.tasks.multihop_world import RELATIONS, Question, World, query

if TYPE_CHECKING:
    from thornback.data.tasks.multihop import MultihopTask


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFlaws:
    """How often episodes are spoiled, each chance by itself: an answer before the last hop, or without any search; in
    any turn another relation or another name than was to be looked up; a search that is made twice; a turn whose tag is
    missing."""

    early: float = 0.15
    wrong_relation: float = 0.10
    wrong_name: float = 0.10
    repeated: float = 0.20
    broken_tags: float = 0.05


def make_episodes(task: MultihopTask, count: int, seed: int, flaws: SearchFlaws) -> list[Demonstration]:
    """`count` episodes over training questions, with what the task's own search finds."""
    from thornback.data.tasks.multihop import prompt_of

    rng = np.random.default_rng([seed, 13])
    questions = list(task.questions("train"))
    made = []
    for i in rng.integers(len(questions), size=count):
        world, question = questions[i]
        prompt = prompt_of(world, question)
        environment = task.environment(prompt, 0)
        turns: list[str | tuple[Message, ...]] = []
        for turn in _turns(question, task.worlds[world], flaws, rng):
            turns.append(turn)
            messages = environment.step(turn).messages
            if not messages:
                break
            turns.append(messages)
        made.append(Demonstration(prompt, turns=tuple(turns)))
    return made


def _turns(question: Question, world: World, flaws: SearchFlaws, rng: np.random.Generator) -> list[str]:
    """What the model writes, turn by turn. After a mistake it goes on from what it has found."""
    at, turns = question.start, []
    path = question.path
    if rng.random() < flaws.early:
        path = path[: rng.integers(len(path))]
    for relation in path:
        asked = RELATIONS[relation][0]
        others = [r for r, (kind, _) in RELATIONS.items() if kind == asked and r != relation]
        if others and rng.random() < flaws.wrong_relation:
            relation = others[rng.integers(len(others))]
        if (relation, at) not in world.facts:  # a wrong relation before has led to another kind of thing
            break
        turns += [_tagged("search", query(relation, at), flaws, rng)] * (1 + int(rng.random() < flaws.repeated))
        at = world.facts[relation, at]
        if rng.random() < flaws.wrong_name:
            at = _another(at, world, rng)
    turns.append(_tagged("answer", f" {at}", flaws, rng))
    return turns


def _another(name: str, world: World, rng: np.random.Generator) -> str:
    """Of the same kind."""
    (names,) = (names for names in world.entities.values() if name in names)
    return names[rng.integers(len(names))]


def _tagged(tag: str, text: str, flaws: SearchFlaws, rng: np.random.Generator) -> str:
    begin, end = f"<{tag}>", f"</{tag}>"
    if rng.random() < flaws.broken_tags:
        begin, end = (begin, "") if rng.random() < 0.5 else ("", end)
    return f"{begin}{text}{end}"
