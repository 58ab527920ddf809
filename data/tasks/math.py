"""Any dataset of problems with a final answer, judged by math-verify: GSM8K, DAPO-Math-17k, or one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from thornback.contracts import Completion, ConfigError, Prompt, Reward
from thornback.data.math_judge import MathJudge
from thornback.data.readers import read_prompts
from thornback.data.rewards import BoxedFormat, Brevity, Correct
from thornback.data.tasks.drawing import is_held_out

SYSTEM_PROMPT = "Reason step by step, and put your final answer within \\boxed{}."


class MathTask:
    """Problems from `path` (a file, a directory, any pyarrow.fs location, or a hub name; see readers.py).

    `test_path`: the held-out problems; None: a share of `path`, `held_out_share`, chosen by hash. `columns` maps
    `prompt` and `answer` to the dataset's own names where they are not found by themselves. Rewards: `correct`,
    `format` (one \\boxed answer) and, with a `budget` in tokens, `brevity`. `seconds`: the time to judge one answer.
    """

    name = "math"

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        columns: Mapping[str, str] | None = None,
        split: str = "train",
        test_split: str = "test",
        subset: str | None = None,
        held_out_share: float = 0.1,
        budget: int | None = None,
        margin: int = 0,
        max_bad_rows: int = 0,
        seconds: float = 5.0,
        system_prompt: str | None = SYSTEM_PROMPT,
    ) -> None:
        self.path = path
        self.test_path = test_path
        self.columns = dict(columns or {})
        self.splits = {"train": split, "test": test_split}
        self.subset = subset
        self.held_out_share = held_out_share
        self.max_bad_rows = max_bad_rows
        self.system_prompt = system_prompt
        self.judge = MathJudge(seconds)
        brevity = () if budget is None else (Brevity(budget, margin),)
        self.rewards: tuple[Reward, ...] = (Correct(self.is_correct), BoxedFormat(), *brevity)

    def prompts(self, split: str) -> Iterator[Prompt]:
        """Raises `DataError` for missing files, and for more bad rows than `max_bad_rows`."""
        if split not in self.splits:
            raise ConfigError(f'The task math has the splits train and test, not "{split}".')
        if split == "test" and self.test_path is not None:
            return iter(self._read(self.test_path, self.splits["test"]))
        if self.test_path is not None:
            return iter(self._train_rows)
        return (p for p in self._train_rows if self._is_held_out(p) == (split == "test"))

    @cached_property
    def _train_rows(self) -> list[Prompt]:
        return self._read(self.path, self.splits["train"])

    def _read(self, path: str, split: str) -> list[Prompt]:
        found = read_prompts(path, columns=self.columns, split=split, subset=self.subset, needs_answer=True)
        return found.checked(self.max_bad_rows)

    def _is_held_out(self, prompt: Prompt) -> bool:
        """By the problem's text: a problem that stands twice in the data is in one split only."""
        return is_held_out(prompt.messages[-1]["content"], self.held_out_share)

    def is_correct(self, completion: Completion) -> bool:
        return self.judge.equal(completion.text, completion.prompt.answer or "")
