"""Outputs of several steps as one."""

from __future__ import annotations

from collections.abc import Sequence

from thornback.contracts import Output


def merge_outputs(outputs: Sequence[Output]) -> list[Output]:
    """One output a sample, in order of first appearance; the version is that of the newest tokens."""
    by_index: dict[int, list[Output]] = {}
    for output in outputs:
        by_index.setdefault(output.index, []).append(output)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in by_index.values()]


def _joined(parts: list[Output]) -> Output:
    first, last = parts[0], parts[-1]
    tops = None
    if first.top_logprobs is not None:
        tops = [top for part in parts for top in part.top_logprobs or ()]
    return Output(
        request_id=first.request_id,
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=[value for part in parts for value in part.logprobs],
        index=first.index,
        finish_reason=last.finish_reason,
        weight_version=last.weight_version,
        num_cached_tokens=first.num_cached_tokens,
        top_logprobs=tops,
        prompt_logprobs=first.prompt_logprobs,
    )
