"""What an engine refuses to begin."""

from __future__ import annotations

from collections.abc import Collection

from thornback.contracts import InvalidRequest, Request


def check_request(request: Request, vocab_size: int, max_model_len: int, adapters: Collection[str]) -> None:
    """Raise `InvalidRequest` for a request that could never run."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    length = len(prompt) + len(request.output_token_ids)
    if not prompt:
        raise InvalidRequest("The prompt is empty; give at least one token.")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InvalidRequest(
            f"The prompt holds token {max(max(prompt), -min(prompt))}, but the vocabulary has {vocab_size} tokens."
        )
    if length >= max_model_len:
        raise InvalidRequest(
            f"The prompt has {length} tokens, but this engine holds {max_model_len} a request, "
            "the answer included; shorten the prompt or raise max_model_len."
        )
    if request.output_token_ids and (sampling.n > 1 or len(request.output_token_ids) >= sampling.max_tokens):
        raise InvalidRequest("A request that goes on after earlier output needs n = 1 and room below max_tokens.")
    if request.adapter is not None and request.adapter not in adapters:
        known = ", ".join(sorted(adapters)) or "none"
        raise InvalidRequest(f"There is no adapter named {request.adapter}; loaded: {known}.")
