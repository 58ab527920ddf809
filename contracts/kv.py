"""A request's keys and values on the move: descriptors that only a transport looks into."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to read blocks of a pool until `expires_at` (seconds, `time.time()` of the owner's node)."""

    lease_id: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class BlockRun:
    """`length` neighbouring blocks of a pool, the first one numbered `start`."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class KVExport:
    """Blocks that one engine offers: the keys and values of a request's first `num_tokens` tokens.

    `location` names the pool for a transport (a shared-memory file's path, or "" for this process).
    `block_shape` is `(num_layers, 2, kv_heads, block_size, head_dim)`; both pools must agree on it, except that the
    layers may end with a draft head's, which has read `num_drafted_tokens`; `hidden` `[H]` is the last hidden state,
    from which it goes on. What a small model that drafts has read stays behind: it reads the tokens again.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_tokens: int
    runs: tuple[BlockRun, ...]
    location: str
    lease: Lease
    dtype: str
    block_shape: tuple[int, ...]
    weight_version: int
    num_drafted_tokens: int = 0
    hidden: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class KVImport:
    """Keys and values that arrived: `blocks` is `[num_blocks, *block_shape]`, read once while adding the request; the
    rest as in `KVExport`."""

    num_tokens: int
    blocks: np.ndarray = field(repr=False)
    weight_version: int
    num_drafted_tokens: int = 0
    hidden: np.ndarray | None = field(default=None, repr=False)
