"""A made-up world of people, companies and cities, and the facts that hold in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product

import numpy as np

from thornback.contracts import ConfigError
from thornback.data.tasks.drawing import distinct

# Relation: of what kind of thing it is asked, and what kind answers.
RELATIONS = {
    "mother": ("person", "person"),
    "teacher": ("person", "person"),
    "employer": ("person", "company"),
    "birthplace": ("person", "city"),
    "founder": ("company", "person"),
    "seat": ("company", "city"),
    "mayor": ("city", "person"),
}
_SYLLABLES = [a + b for a, b in product("bdfklmnprstvz", "aeiou")]
MAX_NAMES = {"person": 192, "company": 48, "city": 48}


def _names() -> dict[str, tuple[str, ...]]:
    """Different made-up words of two syllables and a consonant for each kind of thing, always the same."""
    rng = np.random.default_rng(1)
    found: dict[str, None] = {}
    while len(found) < sum(MAX_NAMES.values()):
        first, second = (_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=2))
        found[f"{first}{second}{'lnrst'[rng.integers(5)]}".capitalize()] = None
    words = iter(found)
    return {kind: tuple(islice(words, count)) for kind, count in MAX_NAMES.items()}


NAMES = _names()


def vocabulary(num_people: int) -> tuple[str, ...]:
    """What all texts of such worlds are made of: one token each lets a tiny model copy names instead of spelling."""
    names = [name for kind, count in _sizes(num_people).items() for name in NAMES[kind][:count]]
    return ("Who", "What", "About", *(f" {word}" for word in ("is", "the", "of", *RELATIONS, *names)))


def _sizes(num_people: int) -> dict[str, int]:
    return {"person": num_people, "company": max(2, num_people // 4), "city": max(2, num_people // 4)}


@dataclass(frozen=True, slots=True)
class Question:
    """`path`: the relations in the order in which they are looked up, from `start` on; `entities`: what each leads
    to, the last of which is the answer."""

    start: str
    path: tuple[str, ...]
    entities: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.entities[-1]

    @property
    def key(self) -> str:
        return f"{self.start}/{'/'.join(self.path)}"

    @property
    def text(self) -> str:
        asked = "".join(f" the {relation} of" for relation in reversed(self.path))
        return f"{'Who' if RELATIONS[self.path[-1]][1] == 'person' else 'What'} is{asked} {self.start}?"

    def queries(self) -> list[str]:
        """What to search for, one after the other."""
        return [query(relation, at) for relation, at in zip(self.path, (self.start, *self.entities), strict=False)]


def document(relation: str, entity: str, answer: str) -> str:
    return f"About {entity}: the {relation} of {entity} is {answer}."


def query(relation: str, entity: str) -> str:
    return f" {relation} of {entity}"


class World:
    """`num_people` people, a quarter as many companies and cities each, every relation of each a fact. Worlds of other
    seeds have the same names and other facts: what one knows of one world is of no use in another."""

    def __init__(self, num_people: int, seed: int | Sequence[int]) -> None:
        most = MAX_NAMES["person"]
        if not 4 <= num_people <= most:
            raise ConfigError(f"The task multihop has names for 4 to {most} people, not {num_people}.")
        rng = np.random.default_rng(seed)
        self.entities = {kind: NAMES[kind][:count] for kind, count in _sizes(num_people).items()}
        self.facts = {
            (relation, entity): _another(entity, self.entities[answers], rng)
            for relation, (asked, answers) in RELATIONS.items()
            for entity in self.entities[asked]
        }

    @cached_property
    def documents(self) -> list[str]:
        """One fact each, under a title: else a search for somebody's mother finds those whose mother she is, too."""
        return [document(relation, entity, answer) for (relation, entity), answer in self.facts.items()]

    def questions(self, count: int, hops: tuple[int, int], seed: Sequence[int]) -> Iterator[Question]:
        """Different ones, whose chains visit nothing twice."""
        rng = np.random.default_rng([*seed, 12])
        drawn = (self._question(int(rng.integers(hops[0], hops[1] + 1)), rng) for _ in itertools.count())

        def refuse(found: int) -> ConfigError:
            return ConfigError(
                f"The task multihop has only about {found} questions of {hops[0]} to {hops[1]} hops in a world of so "
                f"few people, but {count} were asked for; raise num_people or num_worlds."
            )

        return distinct(drawn, count, lambda question: question.key, refuse, patience=100)

    def _question(self, hops: int, rng: np.random.Generator) -> Question | None:
        kinds = [kind for kind in self.entities if kind == "person" or rng.random() < 0.3]
        kind = kinds[int(rng.integers(len(kinds)))]
        entities = [self.entities[kind][rng.integers(len(self.entities[kind]))]]
        path: list[str] = []
        for _ in range(hops):
            possible = [r for r, (asked, _) in RELATIONS.items() if asked == kind]
            relation = possible[int(rng.integers(len(possible)))]
            path.append(relation)
            entities.append(self.facts[relation, entities[-1]])
            kind = RELATIONS[relation][1]
        if len(set(entities)) < len(entities):
            return None
        return Question(entities[0], tuple(path), tuple(entities[1:]))


def _another(entity: str, among: Sequence[str], rng: np.random.Generator) -> str:
    while (found := among[int(rng.integers(len(among)))]) == entity:
        pass
    return found
