"""One sample of a request on its way through the engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from thornback.contracts import KVImport, Request

_HIDDEN = 256  # passes whose hidden states are kept for a draft head: without them it still guesses, but not as well


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is the prompt and what was drawn; keys and values of the first `num_computed_tokens` are in
    the blocks of `block_table`. `num_output_tokens` counts the drawn ones: the next draw's place in the stream.
    """

    request: Request
    index: int
    seed: int
    token_ids: list[int]
    stop_ids: frozenset[int]
    num_prompt_tokens: int
    siblings: list[Sequence] = field(default_factory=list)  # the other samples, until this one's prompt is computed
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_hashed_blocks: int = 0
    prefix_node: int = 0  # the prefix cache's node of the last hashed block
    cacheable: bool = True
    mixes_weights: bool = False  # its keys and values
    prompt_logprobs: list | None = None
    grammar: Any = None
    num_draft_tokens: int = 0  # that the coming pass verifies, if there is room for them
    speculates: bool = True  # until a retriever or the draft fails it
    slot: int = -1  # of what speculation remembers of it
    # Hidden states that a draft head has not read: (position of the first, a pass's states, row of the first, number).
    hidden: deque[tuple[int, Any, int, int]] = field(default_factory=lambda: deque(maxlen=_HIDDEN))
    num_drafted_tokens: int = 0  # that a draft has read
    _tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _num_kept: int = 0  # of `token_ids`, in `_tokens`
    kv: KVImport | None = None  # keys and values that came with the request, until they are in blocks

    def context(self) -> np.ndarray:
        """`token_ids` as int64 `[T]`, until the next call."""
        length = len(self.token_ids)
        if length > len(self._tokens):
            self._tokens, self._num_kept = np.empty(2 * length, np.int64), 0
        self._tokens[self._num_kept : length] = self.token_ids[self._num_kept :]
        self._num_kept = length
        return self._tokens[:length]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def in_prefill(self) -> bool:
        """Whether the next forward pass still leaves tokens without keys and values, or there are several to do."""
        return len(self.token_ids) - self.num_computed_tokens > 1
