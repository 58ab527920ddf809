"""Questions that take several searches: over a made-up world, or over the paragraphs of published datasets."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from thornback.contracts import Completion, ConfigError, Observation, Prompt, Reward
from thornback.data.search_index import SearchIndex
from thornback.data.tasks.multihop_files import MultihopFiles
from thornback.data.tasks.multihop_world import Question, World, vocabulary

if TYPE_CHECKING:
    from thornback.data.demonstrations import Demonstration

INSTRUCTIONS = (
    "Answer the question. In each turn write one search, as <search>query</search>, and you will be shown what it "
    "finds; or, when you know it, the answer, as <answer>answer</answer>. You may reason before, in <think> tags."
)
HINT = "Write <search> or <answer>."
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_TURN = re.compile(r"\s*(?:<think>.+?</think>\s*)?<(search|answer)>\s*(?:\S.*?)</\1>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|search|answer)>")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def action_of(turn: str) -> tuple[str, str] | None:
    """The first search or answer of a turn and what it says; None where there is none."""
    found = _ACTION.search(turn)
    return (found[1], found[2].strip()) if found else None


def normalized(answer: str) -> str:
    """SQuAD's: no case, punctuation, articles or doubled spaces."""
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", plain).split())


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, after normalisation."""
    said, wanted = normalized(answer).split(), normalized(truth).split()
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def answer_score(answer: str, truths: tuple[str, ...], long: float = 3.0) -> float:
    """PVPO's r_acc (arXiv 2508.21104): F1 if the answer has at least `long` times as many words as the truth; else 1 if
    it covers the truth, and 0 if not. Of several truths the best counts."""

    def score(truth: str) -> float:
        said, wanted = normalized(answer).split(), normalized(truth).split()
        if len(said) >= long * len(wanted):
            return f1(answer, truth)
        return float(f" {' '.join(wanted)} " in f" {' '.join(said)} ") if wanted else 0.0

    return max(map(score, truths), default=0.0)


def truths_of(prompt: Prompt) -> tuple[str, ...]:
    return (prompt.answer or "", *prompt.extra.get("aliases", ()))


@dataclass(frozen=True)
class Answer:
    """`answer_score` of the last turn's answer, 0 where there is none."""

    name: str = "answer"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        action = action_of(completion.own_turns[-1])
        return answer_score(action[1], truths_of(completion.prompt)) if action and action[0] == "answer" else 0.0


@dataclass(frozen=True)
class EpisodeFormat:
    """1 where each turn is one search, the last one answer, with at most a thought before it; else 0."""

    name: str = "format"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        turns = completion.own_turns
        kinds = [self._kind(turn) for turn in turns]
        return float(kinds == ["search"] * (len(turns) - 1) + ["answer"])

    @staticmethod
    def _kind(turn: str) -> str | None:
        whole = _TURN.fullmatch(turn)
        tags = len(_TAG.findall(turn))
        return whole[1] if whole and tags == (4 if "<think>" in turn else 2) else None


@dataclass(frozen=True)
class Steps:
    """1 for no more searches than the question has hops, falling linearly to 0 at twice as many."""

    name: str = "steps"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        hops = completion.prompt.extra["hops"]
        return min(1.0, max(0.0, 2.0 - completion.num_calls / hops))


@dataclass
class SearchEnvironment:
    """Shows the model the `top_k` documents that each of its searches finds, until it answers."""

    index: SearchIndex
    top_k: int

    def step(self, turn: str) -> Observation:
        action = action_of(turn)
        if action is None:
            return Observation(({"role": "tool", "content": HINT},))
        kind, said = action
        if kind == "answer":
            return Observation()
        found = "\n".join(self.index.search(said, self.top_k)) or "Nothing."
        return Observation(({"role": "tool", "content": found},), num_calls=1)


class MultihopTask:
    """Questions of `min_hops` to `max_hops` hops, each of which is a search (BM25, the best `top_k` documents).

    With `path`, the questions and paragraphs of MuSiQue, 2WikiMultihopQA or HotpotQA files (see multihop_files.py):
    `test_path` holds the held-out ones, or a share of `path` does, chosen by hash. Without, worlds of `num_people`
    people made from `seed`, where the same names have other facts: `num_worlds` with training questions, so that only
    looking up answers them all, and one with the held-out ones; `words` is their vocabulary. Rewards, as in PVPO:
    `answer`, `format` and `steps`.
    """

    name = "multihop"

    def __init__(
        self,
        path: str | None = None,
        test_path: str | None = None,
        held_out_share: float = 0.1,
        max_bad_rows: int = 0,
        min_hops: int = 2,
        max_hops: int = 3,
        num_people: int = 96,
        num_worlds: int = 16,
        num_train: int = 1024,
        num_test: int = 512,
        top_k: int = 3,
        max_turns: int | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> None:
        if not 1 <= min_hops <= max_hops or top_k < 1 or num_worlds < 1:
            raise ConfigError(
                "The task multihop wants 1 <= min_hops <= max_hops, and top_k and num_worlds of 1 or more."
            )
        self.hops = (min_hops, max_hops)
        self.top_k = top_k
        self.max_turns = max_turns or 2 * max_hops + 1
        self.seed = seed
        self.num_people = num_people
        self.num_worlds = num_worlds
        self.sizes = {"train": num_train, "test": num_test}
        self.files = None if path is None else MultihopFiles(path, test_path, held_out_share, max_bad_rows)
        self._indexes: dict[str, SearchIndex] = {}
        self.system_prompt = system_prompt if path is None or system_prompt is not None else INSTRUCTIONS
        self.words = vocabulary(num_people) if path is None else ()
        self.rewards: tuple[Reward, ...] = (Answer(), EpisodeFormat(), Steps())

    def prompts(self, split: str) -> Iterator[Prompt]:
        """Raises `DataError` for missing files, and for more bad rows than `max_bad_rows`."""
        if split not in self.sizes:
            raise ConfigError(f'The task multihop has the splits train and test, not "{split}".')
        if self.files is not None:
            return self.files.prompts(split)
        return (prompt_of(world, question) for world, question in self.questions(split))

    def questions(self, split: str) -> Iterator[tuple[str, Question]]:
        """The name of a made-up world and what is asked there, world by world in turn."""
        names = [name for name in self.worlds if name.startswith(split)]
        count = self.sizes[split]
        sources = [
            (name, self.worlds[name].questions(len(range(i, count, len(names))), self.hops, [self.seed, i]))
            for i, name in enumerate(names)
        ]
        for i in range(count):
            name, questions = sources[i % len(sources)]
            yield name, next(questions)

    @cached_property
    def worlds(self) -> dict[str, World]:
        names = ("test", *(f"train-{i}" for i in range(self.num_worlds)))
        return {name: World(self.num_people, [self.seed, number]) for number, name in enumerate(names)}

    def index_of(self, world: str) -> SearchIndex:
        """Over a world's documents, made once; of files, one over all paragraphs, whatever their split."""
        if world not in self._indexes:
            documents = self.worlds[world].documents if self.files is None else self.files.documents()
            self._indexes[world] = SearchIndex(documents)
        return self._indexes[world]

    def environment(self, prompt: Prompt, seed: int) -> SearchEnvironment:
        return SearchEnvironment(self.index_of(prompt.extra.get("world", "")), self.top_k)

    def is_correct(self, completion: Completion) -> bool:
        return Answer()(completion) == 1.0

    def demonstrations(self, count: int, seed: int = 0, **flaws: float) -> list[Demonstration]:
        """Imperfect episodes over training questions of the made-up world; `flaws` are fields of `SearchFlaws`."""
        from thornback.data.tasks.multihop_demonstrations import SearchFlaws, make_episodes

        if self.files is not None:
            raise ConfigError("The task multihop gives demonstrations of its made-up world only; leave warm_start out.")
        try:
            return make_episodes(self, count, seed, SearchFlaws(**flaws))
        except TypeError as error:
            raise ConfigError(f"The demonstrations of the task multihop: {error}.") from None


def prompt_of(world: str, question: Question) -> Prompt:
    message = {"role": "user", "content": question.text}
    extra = {"hops": len(question.path), "world": world}
    return Prompt(f"{world}/{question.key}", (message,), question.answer, extra)
