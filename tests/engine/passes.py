"""Passes over a paged pool for tests, and what attention is for their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thornback.engine.attention import PagedBatch


@dataclass
class Case:
    """Sequences of some `contexts` and new tokens, the last of which may be a tree's nodes."""

    contexts: list[int]
    lengths: list[int]
    trees: dict[int, np.ndarray]
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    shares: int = 0


def tree(rng: np.random.Generator, nodes: int) -> np.ndarray:
    return np.array([rng.integers(-1, node) for node in range(nodes)], np.int32)


def seen(case: Case, sequence: int, row: int) -> list[int]:
    """The rows of a sequence whose keys the token at `row` sees, by its ancestors."""
    parents = case.trees.get(sequence, np.empty(0, np.int32))
    root = case.contexts[sequence] + case.lengths[sequence] - len(parents) - 1
    rows = list(range(min(row, root) + 1))
    node = row - root - 1
    while node >= 0:
        rows.append(root + 1 + node)
        node = parents[node]
    return [key for key in rows if case.window is None or key > row - case.window]


def drawn_pass(case: Case, rng: np.random.Generator) -> tuple[Tensor, Tensor, PagedBatch, Tensor]:
    """Queries, a pool of two layers, the pass over it, and the attention of its tokens over layer 1, scaled by 0.3, in
    float64. What no token has written is not a number."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    stops = [c + n for c, n in zip(case.contexts, case.lengths, strict=True)]
    blocks = [-(-stop // case.size) for stop in stops]
    shape = (sum(blocks) + 1, 2, 2, case.kv_heads, case.size, case.width)
    pool = torch.randn(shape, generator=generator).to(case.dtype)
    order = iter(rng.permutation(sum(blocks)) + 1)
    tables = [[int(next(order)) for _ in range(count)] for count in blocks]
    for table, stop in zip(tables, stops, strict=True):
        pool[table[-1], :, :, :, (stop - 1) % case.size + 1 :] = torch.nan
    batch = PagedBatch.of(pool, case.lengths, case.contexts, tables, case.trees)
    total = sum(case.lengths)
    apart = torch.randn(case.heads + 1, total + 3, case.width, generator=generator)  # heads and tokens lie apart
    query = apart.to(case.dtype).transpose(0, 1)[:total, : case.heads]
    group, token = case.heads // case.kv_heads, 0
    wanted = torch.empty(total, case.heads, case.width, dtype=torch.float64)
    for sequence, (context, stop) in enumerate(zip(case.contexts, stops, strict=True)):
        keys, values = (
            pool[tables[sequence], 1].double().permute(1, 2, 0, 3, 4).flatten(2, 3).repeat_interleave(group, 1)
        )
        for row in range(context, stop):
            rows = seen(case, sequence, row)
            weights = (torch.einsum("hd,hsd->hs", query[token].double(), keys[:, rows]) * 0.3).softmax(-1)
            wanted[token] = torch.einsum("hs,hsd->hd", weights, values[:, rows])
            token += 1
    return query, pool, batch, wanted
