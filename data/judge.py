"""A judge as a reward: a model behind any endpoint that speaks OpenAI's protocol says how good an answer is."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thornback.contracts import Completion, ConfigError, RewardError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TEMPLATE = (
    "Judge an answer to a question.\n\nQuestion:\n{prompt}\n\nReference answer:\n{reference}\n\nAnswer:\n{answer}\n\n"
    "How good is the answer, from {low} (worst) to {high} (best)? End with a line: Score: <number>"
)
_SCORE = r"(?i)score\W{0,5}(-?\d+(?:\.\d+)?)"
_SAID = 80  # characters of an answer without a score that an error quotes


class JudgeReward:
    """What a judge says of each completion, `range` mapped to [0, 1] by whoever trains.

        rewards:
          helpful: {function: "thornback.data:JudgeReward", options: {base_url: "http://judge:8000/v1", model: judge}}

    `template` may use {prompt}, {reference}, {answer}, {low} and {high}; the last match of `pattern` in what the judge
    says is the score. `api_key_variable` names the environment variable that holds the key. Requests that fail are
    tried `retries` times more, after growing waits; `concurrency` of them go at once. The same question is asked once:
    answers are kept in memory and, with `cache`, in a file that several reward actors of a machine may share.

    `max_requests` and `max_tokens` are the budget of one reward actor; when it is spent, judgements fail. What fails,
    or says no score, fails for that completion alone: see `scoring.max_failed_share`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        low: float = 0.0,
        high: float = 10.0,
        template: str = TEMPLATE,
        pattern: str = _SCORE,
        api_key_variable: str = "OPENAI_API_KEY",
        max_answer_tokens: int = 512,
        temperature: float = 0.0,
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 4,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        cache: str | None = None,
    ) -> None:
        self.base_url = base_url
        self.model = model
        self.range = (low, high)
        self.template = template
        self.max_answer_tokens = max_answer_tokens
        self.temperature = temperature
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.api_key = os.environ.get(api_key_variable, "none")
        self.num_requests = self.num_tokens = 0  # that were paid for
        try:
            self.pattern = re.compile(pattern)
            template.format(prompt="", reference="", answer="", low=low, high=high)
        except (re.error, KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"JudgeReward: the template or the pattern cannot be used: {error!r}.") from error
        if self.pattern.groups < 1:
            raise ConfigError("JudgeReward: the pattern needs a group, which is the score.")
        self._answers = Answers(cache)

    def score_all(self, completions: Sequence[Completion]) -> list[float | Exception]:
        """A score of each, or why there is none."""
        questions = [self._question(completion) for completion in completions]
        keys = [self._key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._answers}
        failed = asyncio.run(self._ask(missing)) if missing else {}
        return [failed[key] if key in failed else self._score(self._answers[key]) for key in keys]

    def _question(self, completion: Completion) -> str:
        low, high = self.range
        prompt = "\n".join(message["content"] for message in completion.prompt.messages)
        reference = completion.prompt.answer or "(none)"
        return self.template.format(
            prompt=prompt, reference=reference, answer=completion.text, low=f"{low:g}", high=f"{high:g}"
        )

    def _key(self, question: str) -> str:
        asked = json.dumps([self.model, self.temperature, self.max_answer_tokens, question])
        return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()

    def _score(self, said: str) -> float | Exception:
        found = self.pattern.findall(said)
        if not found:
            return RewardError(f"heard no score from the judge, but {said[-_SAID:]!r}.")
        last = found[-1]
        return float(last if isinstance(last, str) else last[0])

    async def _ask(self, questions: dict[str, str]) -> dict[str, Exception]:
        """Ask all of them, and keep the answers; returns what failed."""
        from openai import AsyncOpenAI

        gate = asyncio.Semaphore(self.concurrency)
        client = AsyncOpenAI(
            base_url=self.base_url, api_key=self.api_key, timeout=self.timeout, max_retries=self.retries
        )
        failed: dict[str, Exception] = {}

        async def one(key: str, question: str) -> None:
            async with gate:
                try:
                    self._answers[key] = await self._answer(client, question)
                except Exception as error:
                    failed[key] = error

        async with client:
            await asyncio.gather(*(one(key, question) for key, question in questions.items()))
        return failed

    async def _answer(self, client: AsyncOpenAI, question: str) -> str:
        for name, spent, most in (
            ("requests", self.num_requests, self.max_requests),
            ("tokens", self.num_tokens, self.max_tokens),
        ):
            if most is not None and spent >= most:
                raise RewardError(f"has spent its budget of {most} {name}; raise it, or set a cache.")
        self.num_requests += 1
        answer = await client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": question}],
            temperature=self.temperature,
            max_tokens=self.max_answer_tokens,
        )
        self.num_tokens += answer.usage.total_tokens if answer.usage else 0
        return answer.choices[0].message.content or ""


class Answers:
    """What was said, by key: in memory, and in a SQLite file that processes share, if one is named."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        self._file: sqlite3.Connection | None = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            try:
                self._file = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
                self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, said TEXT NOT NULL)")
            except sqlite3.Error as error:
                raise ConfigError(f"JudgeReward: {path} cannot be used as a cache: {error}.") from error

    def __reduce__(self) -> tuple:
        return Answers, (self._path,)  # a connection stays with its process

    def __contains__(self, key: str) -> bool:
        if key not in self._known and self._file is not None:
            row = self._file.execute("SELECT said FROM answers WHERE key = ?", (key,)).fetchone()
            if row is not None:
                self._known[key] = row[0]
        return key in self._known

    def __getitem__(self, key: str) -> str:
        return self._known[key]

    def __setitem__(self, key: str, said: str) -> None:
        self._known[key] = said
        if self._file is not None:
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, said))
