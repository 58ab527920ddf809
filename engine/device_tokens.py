"""Tokens that a Triton kernel reads the pool for: which pools it can read, and how neighbouring tokens form tiles."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from thornback.engine.paged_attention import PagedTokens

_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_AMPERE = (8, 0)  # the first GPUs that multiply bfloat16


def usable(pool: Tensor) -> bool:
    """Whether the kernel can read a pool like this: on a GPU, or anywhere under Triton's interpreter."""
    if pool.dtype not in _DTYPES:
        return False
    if pool.device.type == "cuda":
        return _runs_on(pool.device)
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@functools.cache  # so that it is said once
def _runs_on(device: torch.device) -> bool:
    lacking = ""
    if importlib.util.find_spec("triton") is None:
        lacking = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < _AMPERE:
        lacking = "the GPU is older than Ampere"
    if lacking:
        _log.warning("%s: keys and values are gathered for torch's attention in every pass on %s.", lacking, device)
    return not lacking


@dataclass(slots=True)
class DeviceTokens:
    """`PagedTokens` on a device. `numbers` int64 `[5, n]`: their `tokens`, `owners`, `lengths`, `bases` and `bits`, in
    one copy; `tables` `[B, N]`. What the host decides by stays there: `owners`, the `longest` of the lengths, and the
    longest `run` of neighbours of one owner."""

    numbers: Tensor
    tables: Tensor
    owners: np.ndarray
    longest: int
    run: int
    _tiles: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, at: PagedTokens, device: torch.device) -> DeviceTokens:
        owners = at.owners.numpy()
        numbers = torch.stack([at.tokens, at.owners, at.lengths, at.bases, at.bits]).to(device)
        return cls(numbers, at.tables.to(device), owners, int(at.lengths.max()), int(_runs(owners)[1].max()))

    def tiles(self, most: int) -> Tensor:
        """Tiles of up to `most` neighbouring tokens of one owner: int64 `[2, M]`, their first tokens and sizes."""
        if most not in self._tiles:
            starts, sizes = _runs(self.owners)
            pieces = -(-sizes // most)
            nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            counts = np.minimum(np.repeat(sizes, pieces) - nth * most, most)
            tiles = np.stack([np.repeat(starts, pieces) + nth * most, counts])
            self._tiles[most] = torch.from_numpy(tiles).to(self.numbers.device)
        return self._tiles[most]

    def advance(self, at: PagedTokens, entering: np.ndarray) -> None:
        """Follow the same tokens where each sees one more key, and the owners `entering` have got another block."""
        self.numbers[2].copy_(at.lengths)
        self.longest += 1
        if len(entering):
            rows = torch.from_numpy(entering)
            self.tables.index_copy_(0, rows.to(self.tables.device), at.tables[rows].to(self.tables.device))


def _runs(owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of neighbours of one owner start, and how long they are."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    return starts, np.diff(starts, append=len(owners))
