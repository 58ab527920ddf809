"""Text from tokens, as they come: what is emitted never has to be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not, or not yet, a character

_MAX_SILENT = 64

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Decodes one sample incrementally; the pieces joined equal the whole sequence decoded at once.

    A token's text depends on those before it (a leading space, the first bytes of a character), so each piece is
    the difference between decoding a short window with the new tokens and without them. While the text ends in an
    unfinished character, nothing is emitted.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []  # tokens emitted last, then those that are pending
        self._emitted = 0  # how many of the window are emitted
        self._text = ""  # the text of those

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` complete; "" while they end within a character."""
        self._window += token_ids
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        if len(text) <= len(self._text):  # tokens that show nothing, as special ones; not to be gathered for ever
            if len(self._window) - self._emitted > _MAX_SILENT:
                del self._window[self._emitted :]
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """The rest, at the end of the sample: bytes that no token completed show as replacement characters."""
        return self._emit(self._decode(self._window))

    def _emit(self, text: str) -> str:
        piece = text[len(self._text) :]
        # The pending tokens become the context of the next; a window that starts at a character's border stays short.
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        self._text = self._decode(self._window)
        return piece
