"""Output that must follow a JSON schema: xgrammar says which tokens may come next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thornback.contracts import InvalidRequest

if TYPE_CHECKING:
    import xgrammar


class GrammarCompiler:
    """Compiles schemas for one tokenizer; compiled ones are cached."""

    def __init__(self, model: str | Path, vocab_size: int, stop_token_ids: list[int]) -> None:
        import xgrammar  # takes seconds, and few engines are ever asked for JSON
        from transformers import AutoTokenizer

        self._xgrammar = xgrammar
        tokenizer = AutoTokenizer.from_pretrained(model)
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(stop_token_ids)
        )
        self.vocab_size = vocab_size
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)

    def matcher(self, json_schema: str) -> xgrammar.GrammarMatcher:
        """A fresh matcher for one sample. Raises `InvalidRequest` for a schema that cannot be compiled."""
        try:
            if json_schema.strip() in ("", "{}"):
                grammar = self._compiler.compile_builtin_json_grammar()
            else:
                grammar = self._compiler.compile_json_schema(json_schema)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InvalidRequest(f"The JSON schema cannot be followed: {reason}") from error
        return self._xgrammar.GrammarMatcher(grammar)

    def banned(self, matchers: list[xgrammar.GrammarMatcher | None]) -> Tensor:
        """bool `[B, V]`: the tokens that each row's matcher forbids (None: forbids nothing)."""
        bits = self._xgrammar.allocate_token_bitmask(len(matchers), self.vocab_size)
        for row, matcher in enumerate(matchers):
            if matcher is None:
                bits[row].fill_(-1)
            else:
                matcher.fill_next_token_bitmask(bits, row)
        shifts = torch.arange(32, dtype=torch.int32)
        allowed = (bits[:, :, None] >> shifts) & 1
        return allowed.view(len(matchers), -1)[:, : self.vocab_size] == 0
