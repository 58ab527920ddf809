"""Safetensors files at any pyarrow.fs location, written and read one tensor at a time.

The `safetensors` library builds the whole file in memory before it writes to anything but a local path; a learner's
state is as large as its memory, so here no second copy of it is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_tensors(
    filesystem: pafs.FileSystem, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> int:
    """Write named tensors (on any device) and string metadata; returns the file's size in bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    with filesystem.open_output_stream(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(pa.py_buffer(_bytes_of(tensor)))
    return 8 + len(text) + end


def read_tensors(filesystem: pafs.FileSystem, path: str) -> tuple[dict[str, str], Iterator[tuple[str, Tensor]]]:
    """The metadata, and the tensors one by one, in host memory and in the file's order."""
    file = filesystem.open_input_file(path)
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__", {})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with file:
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                raw = torch.from_numpy(np.frombuffer(bytearray(file.read(end - begin)), np.uint8))
                yield name, raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    return metadata, tensors()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
