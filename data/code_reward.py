"""Code as an answer: it is run, in the sandbox, on tests."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from thornback.contracts import Completion, RewardError
from thornback.data.sandbox import SandboxLimits, run_python

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


class CodeReward:
    """The share of tests that the last fenced block of Python in an answer passes; 0 without a block.

    Tests are `prompt.extra[column]`: mappings with `input`, what a program reads, and `output`, what it is to print,
    trailing blanks aside. Does not apply where there are none. `all_or_nothing`: 1 where all pass, else 0. `seconds`,
    `memory_bytes`: of each test. `num_workers` programs run at once (None: as many as there are cores).
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        column: str = "tests",
        all_or_nothing: bool = False,
        seconds: float = 5.0,
        memory_bytes: int = 512 << 20,
        num_workers: int | None = None,
    ) -> None:
        self.column = column
        self.all_or_nothing = all_or_nothing
        self.limits = SandboxLimits(seconds=seconds, memory_bytes=memory_bytes)
        self.num_workers = num_workers or len(os.sched_getaffinity(0))

    def score_all(self, completions: Sequence[Completion]) -> list[float | Exception | None]:
        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(self._score, completions))

    def _score(self, completion: Completion) -> float | Exception | None:
        tests = completion.prompt.extra.get(self.column)
        if not tests:
            return None
        blocks = _BLOCK.findall(completion.own_turns[-1])
        if not blocks:
            return 0.0
        passed = 0
        try:
            for test in tests:
                right = self._passes(blocks[-1], test)
                if self.all_or_nothing and not right:
                    return 0.0
                passed += right
        except RewardError as error:
            return error
        return passed / len(tests)

    def _passes(self, code: str, test: Mapping[str, str]) -> bool:
        ran = run_python(code, test["input"], self.limits)
        return ran.exit_code == 0 and _lines(ran.stdout) == _lines(test["output"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
