"""From a request's fields to the engine's sampling parameters."""

from __future__ import annotations

from thornback.contracts import InvalidRequest, SamplingParams
from thornback.serve.errors import BadRequest
from thornback.serve.protocol.common import GenerationRequest


def sampling_params(
    request: GenerationRequest,
    *,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    json_schema: str | None = None,
) -> SamplingParams:
    """Null means the default."""
    if json_schema is not None and (request.ignore_eos or request.min_tokens):
        raise BadRequest("Output that follows a schema ends where that ends: leave ignore_eos and min_tokens out.")
    try:
        return SamplingParams(
            n=request.n,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            min_p=request.min_p or 0.0,
            max_tokens=max_tokens,
            min_tokens=request.min_tokens,
            stop=request.stops,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            seed=request.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=request.ignore_eos,
            json_schema=json_schema,
        )
    except InvalidRequest as error:
        raise BadRequest(str(error)) from error
