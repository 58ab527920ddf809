"""Sampling parameters of a request, with vLLM's names and meanings."""

from __future__ import annotations

from dataclasses import dataclass

from thornback.contracts.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch a truncation off.
    `stop` strings are handled by the gateway, which sees text; an engine looks at
    `stop_token_ids` and at the end-of-sequence token only. Sample `i` of `n` draws from seed
    `seed + i`, so it equals a request of its own with that seed. `seed` None: the engine picks one.
    `logprobs` k: the k most likely alternatives of each token too; the drawn token's own
    log-probability is always returned. `prompt_logprobs` likewise for the prompt's tokens.
    `json_schema`: a JSON schema (or "{}" for any JSON object) that the output must follow.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    json_schema: str | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.n >= 1, "n", self.n, "at least 1"),
            (self.temperature >= 0.0, "temperature", self.temperature, "0 or more"),
            (0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]"),
            (self.top_k >= -1, "top_k", self.top_k, "-1, 0 (off) or more"),
            (0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "in [0, 1]"),
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "between 0 and max_tokens"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "0 or more"),
            (
                self.prompt_logprobs is None or self.prompt_logprobs >= 0,
                "prompt_logprobs",
                self.prompt_logprobs,
                "0 or more",
            ),
        )
        for ok, name, value, wanted in checks:
            if not ok:
                raise InvalidRequest(f"{name} is {value}, but must be {wanted}.")

    @property
    def truncates(self) -> bool:
        """Whether the drawn distribution differs from the one whose log-probabilities are reported."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0 or self.json_schema is not None
