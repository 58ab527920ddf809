"""The paged KV pool: block-outermost, so that a request's blocks are runs of contiguous memory (papers.md, 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from thornback.contracts import STORAGE_DTYPES, KVExport
from thornback.engine.weights import dtype_name


class KVPool:
    """`tensor` is `[num_blocks, layers, 2, kv_heads, block_size, head_dim]`; index 0 of the third holds keys.

    Within a block each head's tokens lie together, so that gathering a sequence's blocks gives what attention
    multiplies, without another copy.

    With a `location` (a path, best under /dev/shm) the pool lies in that file, and other processes of the node
    can map it.
    """

    def __init__(
        self,
        num_blocks: int,
        block_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        location: str = "",
    ) -> None:
        shape = (num_blocks, *block_shape)
        self.location = location
        self.block_shape = block_shape
        self.dtype = dtype_name(dtype)
        if location:
            size = int(np.prod(shape))
            self.tensor: Tensor = torch.from_file(location, shared=True, size=size, dtype=dtype).view(shape)
        else:
            # Zeroed memory comes untouched from the kernel: blocks cost real memory only once they are used.
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, blocks: Sequence[int], data: np.ndarray) -> None:
        """Fill `blocks` from `data` `[len(blocks), *block_shape]` (bfloat16 as uint16); layers that only one of
        the two has, such as a draft head's, are left out."""
        source = torch.from_numpy(data if data.flags.writeable else data.copy())
        if self.dtype == "bfloat16":
            source = source.view(torch.bfloat16)
        layers, source = self.tensor[:, : source.shape[1]], source[:, : self.tensor.shape[1]]
        layers.index_copy_(0, torch.tensor(list(blocks), device=layers.device), source.to(layers.device))

    def move_tokens(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy the keys and values of tokens, `[n]` places each (block * block_size + row); all are read before any is
        written."""
        size, width = self.block_shape[-2:]
        heads = int(np.prod(self.block_shape[:-2]))  # of all layers, keys and values
        rows = self.tensor.view(-1, width)
        # Where each head's row of each token lies, `[n, heads]`: whole rows are copied, in one call each way.
        first = (np.stack([sources, targets]) // size * heads)[:, :, None] + np.arange(heads)
        places = torch.from_numpy(first * size + (np.stack([sources, targets]) % size)[:, :, None]).to(rows.device)
        rows.index_copy_(0, places[1].ravel(), rows.index_select(0, places[0].ravel()))

    def copy_block(self, source: int, target: int) -> None:
        self.tensor[target] = self.tensor[source]


def read_export(export: KVExport) -> np.ndarray:
    """Copy an exported request's blocks out of another process's pool file: `[num_blocks, *block_shape]`.

    One copy a run of neighbouring blocks, straight from the mapped file.
    """
    storage = np.dtype(STORAGE_DTYPES[export.dtype])
    block_bytes = int(np.prod(export.block_shape)) * storage.itemsize
    mapped = np.memmap(export.location, mode="r", dtype=np.uint8)
    num_blocks = sum(run.length for run in export.runs)
    out = np.empty((num_blocks, *export.block_shape), storage)
    flat, at = out.view(np.uint8).reshape(-1), 0
    for run in export.runs:
        size = run.length * block_bytes
        flat[at : at + size] = mapped[run.start * block_bytes : run.start * block_bytes + size]
        at += size
    return out
