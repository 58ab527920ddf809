"""The paged KV pool: block-outermost, so that a request's blocks are runs of contiguous memory (papers.md, 4)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from thornback.contracts import SHARED, ConfigError
from thornback.engine.weights import dtype_name


class KVPool:
    """`tensor` is `[num_blocks, layers, 2, kv_heads, block_size, head_dim]`; index 0 of the third holds keys.

    Within a block each head's tokens lie together, so that gathering a sequence's blocks gives what attention
    multiplies, without another copy.

    With a `location` the pool lies in shared memory, and other processes of the node can map it: in that file, best
    under /dev/shm, or, `SHARED`, in memory that goes when this process does, however it ends.
    """

    def __init__(
        self,
        num_blocks: int,
        block_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        location: str = "",
        layout: str = "",
    ) -> None:
        """`layout`: see `KVExport`."""
        if location and device.type != "cpu":
            raise ConfigError(
                f"A pool of keys and values on {device} cannot be shared between processes yet: serve without prefill "
                "replicas, or with engine.device=cpu."
            )
        shape = (num_blocks, *block_shape)
        self.location = _anonymous() if location == SHARED else location
        self.block_shape, self.layout = block_shape, layout
        self.dtype = dtype_name(dtype)
        if location:
            size, path = int(np.prod(shape)), self.location.partition("#")[0]
            self.tensor: Tensor = torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
        else:
            # Zeroed memory comes untouched from the kernel: blocks cost real memory only once they are used.
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def rows(self) -> np.ndarray:
        """The pool's memory, uint8 `[num_blocks, bytes of a block]`; only where it is the processor's."""
        return self.tensor.view(len(self.tensor), -1).view(torch.uint8).numpy()

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


def _anonymous() -> str:
    """Where other processes find a new file that has no name in any directory: the path of this process' descriptor,
    and behind a # how the file calls itself, since descriptors and processes' numbers are used again."""
    name = f"thornback-kv-{uuid.uuid4().hex}"
    return f"/proc/{os.getpid()}/fd/{os.memfd_create(name)}#{name}"


def pool_exists(location: str) -> bool:
    """Whether a pool's memory can be reached from this process."""
    path, _, name = location.partition("#")
    if not name:
        return bool(path) and os.path.exists(path)
    try:
        return name in os.readlink(path)
    except OSError:
        return False
