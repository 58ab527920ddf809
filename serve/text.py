"""Everything that knows both text and tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thornback.contracts import ModelError
from thornback.serve.detokenizer import REPLACEMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")  # a byte as sentencepiece names it


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies name bytes: printable ones themselves, the others moved up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name; raises `ModelError` where there is none."""
    from thornback.data import load_tokenizer as load  # with transformers, in the gateway's process only

    try:
        return load(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"The tokenizer of {model} cannot be loaded: {reason}") from error


class Text:
    """Encodes and decodes for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._shown: dict[int, str] = {}
        # The first call drops a truncation or padding that was saved with the tokenizer; doing that while another
        # thread encodes would raise.
        self.encode("a")

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with what the tokenizer puts around one (a BOS token, where it has one)."""
        return list(self.tokenizer(text).input_ids)

    def encode_part(self, text: str) -> list[int]:
        """Token ids of a text that goes on after another."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids, True)

    def show(self, token_id: int) -> str:
        """One token as text, special ones too; one that is only a part of a character as OpenAI writes it, its
        bytes in hexadecimal, so that different tokens look different."""
        text = self._shown.get(token_id)
        if text is None:
            text = self._decode([token_id], False)
            if REPLACEMENT in text:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(token_id))
            self._shown[token_id] = text
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        text = self._decode([token_id], False)
        if REPLACEMENT not in text:
            return text.encode()
        name = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if _BYTE_NAME.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        if all(letter in _BYTE_OF for letter in name):
            return bytes(_BYTE_OF[letter] for letter in name)
        return text.encode()

    def _decode(self, token_ids: Sequence[int], skip_special: bool) -> str:
        decoded: Any = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return decoded
