"""Model weights as one flat buffer with an index: what the learner publishes and every engine maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

# numpy has no bfloat16: its bits travel as uint16 under the tag of the real type.
STORAGE_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "float64": np.float64}
ALIGNMENT = 64  # bytes; a cache line, and what vector loads want


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one parameter lies in a flat buffer. `offset` in bytes, a multiple of `ALIGNMENT`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(STORAGE_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True, slots=True)
class WeightView:
    """A set of parameters: `buffer` is uint8 `[bytes]`, often read-only and mapped from the object store.

    Tied parameters appear once, under the name that `named_parameters` gives them.
    """

    buffer: np.ndarray
    index: tuple[TensorSpec, ...]

    def array(self, spec: TensorSpec) -> np.ndarray:
        """The parameter as a view `[*spec.shape]` (bfloat16: its uint16 bits)."""
        raw = self.buffer[spec.offset : spec.offset + spec.nbytes]
        return raw.view(STORAGE_DTYPES[spec.dtype]).reshape(spec.shape)

    def __iter__(self) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        return ((spec, self.array(spec)) for spec in self.index)


def weight_index(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[tuple[TensorSpec, ...], int]:
    """Lay `(name, dtype, shape)` out one after the other; returns the index and the buffer's size in bytes."""
    index, end = [], 0
    for name, dtype, shape in tensors:
        spec = TensorSpec(name, dtype, tuple(shape), end)
        index.append(spec)
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(index), end
