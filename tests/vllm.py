"""Where vLLM is installed: in the benchmarks' environment (`make test-vllm`)."""

from __future__ import annotations

import importlib.util

import pytest

NEEDS_VLLM = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here; make test-vllm"),
]
