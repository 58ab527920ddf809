"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from thornback.serve.detokenizer import Detokenizer
from thornback.serve.generation import Piece
from thornback.serve.protocol import ChatChoiceLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from thornback.serve.text import Text

LOWEST = -9999.0  # JSON has no infinity; vLLM says this too
Alternatives = Sequence[tuple[int, float]]


def finite(value: float) -> float:
    return value if math.isfinite(value) else LOWEST


class CompletionScores:
    """Writes one sample's log-probabilities, piece after piece; keeps the place in the text."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._detokenizer = Detokenizer(text.decode)
        self._offset = 0

    def add(self, prompt: Sequence[int], piece: Piece, top: int) -> CompletionLogprobs:
        """Those of `prompt` (empty: it is not echoed) and of the piece. `top` 0: no alternatives."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[] if top else None, text_offset=[])
        if prompt:
            scored = piece.prompt_logprobs or []
            for token, score in zip(prompt, scored, strict=True):
                self._one(result, token, *(score or (None, ())))
        for i, token in enumerate(piece.token_ids):
            self._one(result, token, piece.logprobs[i], piece.top_logprobs[i] if piece.top_logprobs else ())
        return result

    def _one(self, to: CompletionLogprobs, token: int, logprob: float | None, tops: Alternatives) -> None:
        to.tokens.append(self._text.show(token))
        to.token_logprobs.append(None if logprob is None else finite(logprob))
        to.text_offset.append(self._offset)
        self._offset += len(self._detokenizer.push([token]))
        if to.top_logprobs is None:
            return
        if logprob is None:
            to.top_logprobs.append(None)
            return
        best: dict[str, float] = {}
        for other, value in [*tops, (token, logprob)]:
            best.setdefault(self._text.show(other), finite(value))
        to.top_logprobs.append(best)


def join_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Pieces of one sample as one."""
    tops = None
    if parts[0].top_logprobs is not None:
        tops = [top for part in parts for top in part.top_logprobs or ()]
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=tops,
        text_offset=[offset for part in parts for offset in part.text_offset],
    )


def chat_logprobs(text: Text, piece: Piece, top: int) -> ChatChoiceLogprobs:
    """The log-probabilities of a piece's tokens and of `top` alternatives to each."""
    content = []
    for i, token in enumerate(piece.token_ids):
        tops = piece.top_logprobs[i][:top] if piece.top_logprobs else []
        content.append(
            TokenLogprob(
                **_shown(text, token, piece.logprobs[i]),
                top_logprobs=[TopLogprob(**_shown(text, other, value)) for other, value in tops],
            )
        )
    return ChatChoiceLogprobs(content=content, refusal=None)


def _shown(text: Text, token: int, logprob: float) -> dict:
    return {"token": text.show(token), "logprob": finite(logprob), "bytes": list(text.bytes_of(token))}
