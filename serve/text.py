"""Everything that knows both text and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thornback.contracts import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name; raises `ModelError` where there is none."""
    from transformers import AutoTokenizer  # takes seconds, in the gateway's process only

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"The tokenizer of {model} cannot be loaded: {reason}") from error


class Text:
    """Encodes and decodes for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._shown: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with what the tokenizer puts around one (a BOS token, where it has one)."""
        return list(self.tokenizer(text).input_ids)

    def encode_part(self, text: str) -> list[int]:
        """Token ids of a text that goes on after another."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids, True)

    def show(self, token_id: int) -> str:
        """One token as text, special ones too."""
        text = self._shown.get(token_id)
        if text is None:
            text = self._shown[token_id] = self._decode([token_id], False)
        return text

    def _decode(self, token_ids: Sequence[int], skip_special: bool) -> str:
        decoded: Any = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return decoded
