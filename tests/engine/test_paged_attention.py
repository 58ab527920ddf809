"""The compiled kernel over the pool computes what attention is, whatever stands together in a pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.passes import Case, drawn_pass, tree
from thornback.engine.attention import PagedBatch
from thornback.engine.paged_attention import PagedTokens, paged_attention

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


def some(at: PagedTokens, chosen: list[int]) -> PagedTokens:
    arrays = at.tokens, at.owners, at.lengths, at.bases, at.bits
    return PagedTokens(*(array[chosen] for array in arrays), at.tables)


def attend(case: Case, query: Tensor, pool: Tensor, at: PagedTokens) -> Tensor:
    out = torch.full((len(query), case.heads, case.width), 7.0)
    paged_attention(query, pool, 1, at, case.window, 0.3, out)
    return out


def check(case: Case, seed: int) -> None:
    query, pool, batch, wanted = drawn_pass(case, np.random.default_rng(seed))
    assert batch.direct is not None
    assert not batch.groups
    torch.testing.assert_close(attend(case, query, pool, batch.direct).double(), wanted, atol=1e-5, rtol=1e-5)


SHAPES = [
    {"width": 64},
    {"heads": 3, "kv_heads": 1, "width": 24, "size": 6},
    {"heads": 1, "kv_heads": 1, "width": 80, "size": 32},
    {"heads": 5, "kv_heads": 1, "width": 8, "size": 1},
    {"heads": 2, "kv_heads": 2, "width": 7, "size": 300},
]


@pytest.mark.parametrize("window", [None, 1, 9, 64, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_trees_beside_other_sequences(shape, window) -> None:
    """Tokens computed together are of several sequences, of a part of a tree, of a prompt; windows end within trees."""
    rng = np.random.default_rng(len(shape))
    trees = {1: tree(rng, 63), 3: tree(rng, 5), 6: tree(rng, 30)}
    check(Case([37, 90, 0, 15, 600, 0, 300], [1, 64, 1, 6, 1, 20, 40], trees, window=window, **shape), 1)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("root", [0, 14, 15, 16, 17, 254, 255, 256, 257, 511])
def test_trees_that_begin_at_any_place_of_a_block(root, window) -> None:
    rng = np.random.default_rng(root)
    check(Case([root], [64], {0: tree(rng, 63)}, window=window), root)
    check(Case([root, root], [9, 1], {0: np.full(8, -1, np.int32)}, size=8, window=window), root)


@pytest.mark.parametrize("threads", [1, 2])
def test_sequences_that_share_blocks(threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    case = Case([70] * 7, [1] * 7, {}, width=64)
    query, pool, _, _ = drawn_pass(case, np.random.default_rng(0))
    lengths, tables = [1, 2, 1, 5, 1, 1, 1], [[1, 2, 3, 4, 5 + i] for i in range(7)]
    tables[3][1] = 20
    contexts = [70, 64, 79, 66, 70, 65, 70]
    query = torch.randn(sum(lengths), case.heads, case.width)
    pool.nan_to_num_()
    together = PagedBatch.of(pool, lengths, contexts, tables).direct
    got, token = attend(case, query, pool, together), 0
    for length, context, table in zip(lengths, contexts, tables, strict=True):
        alone = PagedBatch.of(pool, [length], [context], [table]).direct
        assert torch.equal(got[token : token + length], attend(case, query[token : token + length], pool, alone))
        token += length
    torch.set_num_threads(before)


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_has_the_same_result_in_any_company(shape, window) -> None:
    """To the last bit: alone, in the pass, and in parts of it."""
    rng = np.random.default_rng(3)
    case = Case([250, 0, 30, 31], [20, 9, 1, 1], {0: tree(rng, 18)}, window=window, **shape)
    query, pool, batch, _ = drawn_pass(case, rng)
    together = attend(case, query, pool, batch.direct)
    for token in range(len(query)):
        assert torch.equal(attend(case, query, pool, some(batch.direct, [token]))[token], together[token])
    for _ in range(5):
        chosen = rng.permutation(len(query))[:13].tolist()
        assert torch.equal(attend(case, query, pool, some(batch.direct, chosen))[chosen], together[chosen])
