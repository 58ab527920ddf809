"""Tensors in files that the safetensors library reads too, written and read one by one."""

from __future__ import annotations

import pyarrow.fs as pafs
import pytest
import torch
from safetensors import safe_open

from thornback.actors.locations import is_local, resolve, write_atomically
from thornback.actors.tensor_file import read_tensors, write_tensors
from thornback.contracts import DataError


def test_round_trip_and_the_library_agrees(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, dtype=torch.float64).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "state": torch.arange(13, dtype=torch.uint8),
        "transposed": torch.randn(4, 6).T,
    }
    path = tmp_path / "x.safetensors"
    size = write_tensors(pafs.LocalFileSystem(), str(path), tensors, {"step": "7"})
    assert path.stat().st_size == size
    metadata, read = read_tensors(pafs.LocalFileSystem(), str(path))
    found = dict(read)
    assert metadata == {"step": "7"}
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor)
            assert found[name].dtype == tensor.dtype
            assert torch.equal(file.get_tensor(name), tensor)


def test_locations(tmp_path):
    filesystem, path = resolve(tmp_path / "a")
    assert path == str(tmp_path / "a")
    write_atomically(filesystem, path, b"one")
    write_atomically(filesystem, path, b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert resolve(f"file://{tmp_path}/a")[1] == str(tmp_path / "a")
    assert is_local("runs/x")
    assert not is_local("s3://bucket/x")
    with pytest.raises(DataError, match="nonsense://x cannot be opened"):
        resolve("nonsense://x")
