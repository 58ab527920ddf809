"""What a model is trained to do: prompts, and named rewards with their ranges."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

Message = Mapping[str, str]  # a chat message: {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. `key` is unique and stable: seeds, anchors and resume hang on it.

    `messages` is the conversation in the chat format, without the task's system prompt. `answer` is the reference
    answer, if there is one; `extra` holds the row's other columns. `tools` are the functions that the model may call,
    in OpenAI's format, for the chat template to present.
    """

    key: str
    messages: tuple[Message, ...]
    answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """A stretch of an episode that one side wrote. An environment's is text as the model's chat template renders it."""

    text: str
    by_model: bool


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of the model to one prompt: what a reward looks at. `num_tokens` counts the model's own tokens.

    Of an episode with an environment, `text` is all of it, `turns` who wrote what, `num_calls` the tool calls that
    were made, and `judged` what the environment itself judged, by name.
    """

    prompt: Prompt
    text: str
    num_tokens: int
    finish_reason: str
    turns: tuple[Turn, ...] = ()
    num_calls: int = 0
    judged: Mapping[str, float] = field(default_factory=dict)

    @property
    def own_turns(self) -> tuple[str, ...]:
        """What the model wrote, turn by turn."""
        return tuple(turn.text for turn in self.turns if turn.by_model) if self.turns else (self.text,)


class Reward(Protocol):
    """A named judgement of a completion. `range` is (low, high); None or NaN means: does not apply."""

    @property
    def name(self) -> str: ...

    @property
    def range(self) -> tuple[float, float]: ...

    def __call__(self, completion: Completion) -> float | None: ...


@runtime_checkable
class BatchReward(Protocol):
    """A `Reward` that judges many completions at once: a model, or a remote judge.

    Before a run starts, rewards judge one made-up answer in the driver. One that is too heavy for that has a method
    `check()` too, which is called instead, and raises for what cannot be used.
    """

    @property
    def name(self) -> str: ...

    @property
    def range(self) -> tuple[float, float]: ...

    def score_all(self, completions: Sequence[Completion]) -> Sequence[float | Exception | None]:
        """A judgement of each, in order; an exception, where that one failed."""


class Task(Protocol):
    """Prompts plus judgement. `rewards` come in the order in which they are reported.

    A task may have `more_rewards` too: they count only where a recipe names them.
    """

    @property
    def name(self) -> str: ...

    @property
    def system_prompt(self) -> str | None: ...

    @property
    def rewards(self) -> tuple[Reward | BatchReward, ...]: ...

    def prompts(self, split: str) -> Iterator[Prompt]:
        """The prompts of "train" or "test", in a fixed order. Nothing of one is in the other."""

    def is_correct(self, completion: Completion) -> bool:
        """The verdict that difficulty, filtering and the report's accuracy go by."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment makes of a turn of the model's.

    `messages` in the chat format, of roles such as tool or user: the model answers them in its next turn; where there
    are none, the episode is over. `num_calls`: tool calls that this turn made. `judged`: judgements that only the
    environment can make, by name; of each name the last one counts.
    """

    messages: tuple[Message, ...] = ()
    num_calls: int = 0
    judged: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """The other side of one episode: made for it, and dropped with it."""

    def step(self, turn: str) -> Observation | Awaitable[Observation]:
        """Answer a turn of the model's, of which `turn` is the text without the token that ends it.

        A plain function is called between two passes of the engine: it must be quick, and its episodes repeat
        themselves to the bit. What waits for something is a coroutine: other episodes go on meanwhile.
        """


@runtime_checkable
class ClosableEnvironment(Environment, Protocol):
    """An `Environment` that is told where its episode ends before it has said so itself."""

    def truncate(self, turn: str | None) -> Observation | Awaitable[Observation]:
        """Judge the episode as it stands; messages are of no use any more. `turn`: what the model has written of a turn
        that it had no tokens to finish; None: there were no tokens or turns left to begin one."""

    def drop(self) -> None:
        """Let go of what the episode holds, since nobody goes on with it. It may be called from any thread, while a
        coroutine of the environment waits, and after the episode."""


@runtime_checkable
class InteractiveTask(Protocol):
    """A `Task` whose model takes turns with an environment. `max_turns`: the most that the model may take."""

    max_turns: int

    def environment(self, prompt: Prompt, seed: int) -> Environment:
        """A fresh one, for one rollout of `prompt`; everything random in it derives from `seed`."""


class RewardScorer(Protocol):
    """What scores a batch of completions: rules here, a model or a remote judge elsewhere."""

    reward_names: tuple[str, ...]
    failures: dict[str, tuple[int, str]]  # of the last call, by cause: how many, and the first one's prompt

    def score(self, completions: list[Completion]) -> dict[str, np.ndarray]:
        """Per reward name, float32 `[len(completions)]`, NaN where it does not apply or fails; and "correct" in {0, 1}
        (NaN: it could not be judged)."""
