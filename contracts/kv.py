"""A request's keys and values on the move: descriptors that only a transport looks into."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MIXED_VERSIONS = -1  # the `weight_version` of keys and values that no single version has computed
SHARED = "shared"  # an engine's `kv_location`: memory that other processes of the node can map


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

    `location` names the pool for a transport (where its shared memory is mapped from, or "" for this process).
    `block_shape` is `(num_layers, 2, kv_heads, block_size, head_dim)`; both pools must agree on it, except that the
    layers may end with a draft head's, which has read `num_drafted_tokens`; `hidden` `[H]` is the last hidden state,
    from which it goes on. What a small model that drafts has read stays behind: it reads the tokens again. `layout`
    names how a block is laid out where that is not the torch engine's way, and must agree, too.
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
    layout: str = ""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks of a receiving engine's pool that wait to be filled, and the right to do so: once the lease has ended they
    may be somebody else's."""

    lease: Lease
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVImport:
    """Keys and values that arrived: `blocks` are the engine's own ones that a transport has filled, or an array
    `[num_blocks, *block_shape]`, copied when the request is first scheduled; the rest as in `KVExport`."""

    num_tokens: int
    blocks: Reservation | np.ndarray = field(repr=False)
    weight_version: int
    num_drafted_tokens: int = 0
    hidden: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What transfers took: how many they were, copies or messages (`num_calls`), bytes and seconds."""

    num_transfers: int = 0
    num_calls: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: TransferStats) -> TransferStats:
        return TransferStats(
            self.num_transfers + other.num_transfers,
            self.num_calls + other.num_calls,
            self.num_bytes + other.num_bytes,
            self.seconds + other.seconds,
        )
