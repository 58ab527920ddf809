"""The one attention function under every model: transformers calls it through its attention interface.

A pass carries tokens packed end to end, `[1, T]`, without padding; only inside attention are several tokens of a
sequence spread over padded groups. `PagedBatch` reads and writes the paged KV pool (generation); `PackedBatch` is plain
causal attention within each sequence, with gradients (training).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from thornback.contracts import ModelError
from thornback.engine import device_tokens, kernels
from thornback.engine.block_tables import BlockTables
from thornback.engine.device_tokens import DeviceTokens
from thornback.engine.layout import NO_PARENTS, NO_TREE, lay_out, place, stand
from thornback.engine.packed_attention import PackedBatch, size_class
from thornback.engine.paged_attention import PagedTokens, paged_attention

ATTENTION_NAME = "thornback"
_FEW = 256  # new tokens of a sequence below which gathering its keys costs more than torch's faster kernel wins
# (measured on CPU; a guess for GPUs)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    batch: PagedBatch | PackedBatch | None = None,
    **unsupported: object,
) -> tuple[Tensor, None]:
    """`query` `[1, heads, T, D]`, `key` and `value` `[1, kv_heads, T, D]`; returns `[1, T, heads, D]`."""
    for name in ("softcap", "s_aux"):
        if unsupported.get(name) is not None:
            raise ModelError(f"{type(module).__name__} asks for attention with '{name}', which thornback lacks.")
    assert batch is not None, "a model with thornback's attention runs on a PagedBatch or PackedBatch"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return batch.attend(module.layer_idx, q, k, v, scaling, sliding_window)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention)


def _grouped_query(q: Tensor, kv_heads: int) -> Tensor:
    """`[B, Q, heads, D]` to `[B, kv_heads, group * Q, D]`: the heads that share keys become rows of one product."""
    b, n, heads, d = q.shape
    return q.view(b, n, kv_heads, heads // kv_heads, d).permute(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, d)


def _ungrouped(out: Tensor, num_queries: int) -> Tensor:
    """The inverse, to `[B, Q, heads, D]`."""
    b, kv_heads, _, d = out.shape
    return out.view(b, kv_heads, -1, num_queries, d).permute(0, 3, 1, 2, 4).reshape(b, num_queries, -1, d)


@dataclass(slots=True)
class PagedGroup:
    """Sequences of like size, padded to one shape: B sequences of at most Q new tokens over N blocks each.

    `rows` `[B * Q]`: each query's place in the packed tokens (padding repeats row 0); `back`: where in `[B * Q]`
    the packed tokens `tokens` stand (None: the group is exactly the tokens `rows`, in order). `blocks`
    `[B * kv_heads * N]`: where the keys of layer 0 lie, counted in rows of `block_size * D`. `positions` `[B, Q]`:
    where each query's own key lies; `tree`: bool `[B, Q, N * block_size]`, which keys a query may see, instead of all
    up to its own.
    """

    num_sequences: int
    num_queries: int
    kv_heads: int
    rows: Tensor
    tokens: Tensor | None
    back: Tensor | None
    blocks: Tensor
    positions: Tensor
    tree: Tensor | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, num_keys: int, window: int | None, dtype: torch.dtype, group: int) -> Tensor:
        """Additive, `[B, 1, group * Q, num_keys]`."""
        if window not in self.masks:
            keys = torch.arange(num_keys, device=self.positions.device)
            distance = self.positions[:, :, None] - keys
            seen = (distance >= 0) if self.tree is None else self.tree
            if window is not None:
                seen = seen & (distance < window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=keys.device).masked_fill_(~seen, -torch.inf)
            self.masks[window] = bias[:, None].repeat(1, 1, group, 1)
        return self.masks[window]

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """`q` `[B * Q, heads, D]`, `keys` and `values` `[B * kv_heads, S, D]`; returns `[B * Q, heads, D]`."""
        b, n, (_, heads, d) = self.num_sequences, self.num_queries, q.shape
        kv_heads, num_keys = keys.shape[0] // b, keys.shape[1]
        queries = _grouped_query(q.reshape(b, n, heads, d), kv_heads)
        mask = self.mask(num_keys, window, q.dtype, heads // kv_heads)
        keys, values = (x.view(b, kv_heads, num_keys, d) for x in (keys, values))
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
        return _ungrouped(out, n).flatten(0, 1)


@dataclass(slots=True)
class PagedBatch:
    """One pass of generation. `pool` is `[num_blocks, layers, 2, kv_heads, block_size, D]`; `positions` int64 `[T]`;
    `slots` int64 `[T * kv_heads]` is where each token's keys of layer 0 go, head by head, counted in rows of `D`.
    Sequences with few new tokens are `direct`, where our kernels work; others are gathered in `groups`. `host`: the
    numbers of `positions` and `slots` in the host's memory; `on_device`: those of `direct` where a Triton kernel reads
    them, if it does."""

    pool: Tensor
    positions: Tensor
    slots: Tensor
    groups: list[PagedGroup]
    direct: PagedTokens | None
    host: tuple[np.ndarray, np.ndarray]
    on_device: DeviceTokens | None

    @classmethod
    def of(
        cls,
        pool: Tensor,
        lengths: list[int],
        contexts: list[int],
        tables: list[list[int]],
        trees: dict[int, np.ndarray] | None = None,
    ) -> PagedBatch:
        """Sequence i brings `lengths[i]` new tokens, packed in this order, after `contexts[i]` earlier ones, over the
        blocks `tables[i]`. Where it is in `trees`, its last tokens, earlier or new, are a draft tree with these
        parents: they lie in the pool one after the other, but stand, and see each other, as the tree says."""
        trees = trees or {}
        parents = np.concatenate([NO_PARENTS, *(trees[i] for i in sorted(trees))])
        stops = np.cumsum([len(trees[i]) if i in trees else 0 for i in range(len(lengths))])
        return cls.of_trees(pool, np.array(lengths), np.array(contexts), BlockTables().of(tables), parents, stops)

    @classmethod
    def of_trees(
        cls,
        pool: Tensor,
        counts: np.ndarray,
        before: np.ndarray,
        table: np.ndarray,
        parents: np.ndarray,
        stops: np.ndarray,
    ) -> PagedBatch:
        """The same of arrays: `counts` and `before` `[B]`, `table` `[B, N]`, and the trees' parents, one behind the
        other, up to `stops` `[B]`."""
        if kernels.usable(pool) and int(counts.max()) < _FEW:
            _, layers, _, kv_heads, size, _ = pool.shape
            strides = layers * 2 * kv_heads * size
            columns, slots = stand(counts, before, parents, stops, table, strides, size, kv_heads)
            tokens, owners, lengths, bases, bits, places = torch.from_numpy(columns).unbind()
            direct = PagedTokens(tokens, owners, lengths, bases, bits, torch.from_numpy(table))
            return cls(pool, places, torch.from_numpy(slots), [], direct, (columns[5], slots), None)
        columns = lay_out(counts, before, parents, stops)
        return cls.of_nodes(pool, columns[0], table, *columns[1:])

    @classmethod
    def of_nodes(
        cls,
        pool: Tensor,
        owners: np.ndarray,
        table: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        bases: np.ndarray,
        bits: np.ndarray,
    ) -> PagedBatch:
        """Tokens `[T]` of the sequences `owners`, in order, whose blocks are in the rows of `table` `[B, N]`. Each has
        its keys at `rows` of its sequence, one after the other, and stands at `positions`. It sees what is up to its
        own row; but from `bases` on only what its `bits` name (`NO_TREE`: everything)."""
        _, layers, _, kv_heads, size, _ = pool.shape
        slots, counts, seen = place(owners, rows, table, layers * 2 * kv_heads * size, size, kv_heads)
        compiled = kernels.usable(pool)
        on_device = not compiled and device_tokens.usable(pool)
        most = _FEW if compiled or on_device else 0
        few = counts < most
        all_few = int(counts.max()) < most
        direct, groups = None, []
        if all_few or few.any():
            arrays = owners, seen, bases, bits
            tokens = np.arange(len(owners))
            if not all_few:
                tokens = tokens[few[owners]]
                arrays = tuple(array[tokens] for array in arrays)
            direct = PagedTokens(*map(torch.from_numpy, (tokens, *arrays, table)))
        if not all_few:
            starts = np.cumsum(counts) - counts
            before = rows[np.minimum(starts, len(rows) - 1)]
            classes: dict[tuple[int, int], list[int]] = {}
            for i in np.flatnonzero(~few).tolist():
                key = (0 if counts[i] == 1 else size_class(counts[i]), size_class(counts[i] + before[i]))
                classes.setdefault(key, []).append(i)
            for members in map(np.array, classes.values()):
                group = _group(members, starts, counts, before, table, pool)
                group.tree = _tree_mask(group, bases, bits, size)
                groups.append(group)
        return cls(
            pool,
            torch.from_numpy(positions).to(pool.device),
            torch.from_numpy(slots).to(pool.device),
            groups,
            direct,
            (positions, slots),
            DeviceTokens.of(direct, pool.device) if on_device and direct is not None else None,
        )

    def advance(self, contexts: list[int], tables: list[list[int]]) -> bool:
        """Make a pass of one token of each sequence, all of them `direct`, that of the token after it. False, and
        nothing done, if the sequences are not there, or if the tables have no room for their blocks."""
        assert self.direct is not None
        (positions, slots), table = self.host, self.direct.tables.numpy()
        _, layers, _, kv_heads, size, _ = self.pool.shape
        entering = np.flatnonzero(positions % size == size - 1)
        full = len(entering) > 0 and positions[entering].max() // size + 1 >= table.shape[1]
        if full or not (positions + 1 == contexts).all():
            return False
        positions += 1
        slots += 1
        self.direct.lengths.numpy()[:] += 1
        for row in entering.tolist():  # a new block
            column = positions[row] // size
            table[row, column] = tables[row][column]
            first = tables[row][column] * layers * 2 * kv_heads * size
            slots[row * kv_heads : (row + 1) * kv_heads] = first + np.arange(kv_heads) * size
        if self.on_device is not None:
            for tensor, numbers in zip((self.positions, self.slots), self.host, strict=True):
                tensor.copy_(torch.from_numpy(numbers))
            self.on_device.advance(self.direct, entering)
        return True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Write the new keys and values, then read every sequence's own: `[T, heads, D]` of all tokens."""
        self._write(layer, k, v)
        if self.direct is None and len(self.groups) == 1 and self.groups[0].back is None:
            return self._read(self.groups[0], layer, q, scaling, window)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self.direct is not None:
            scale = scaling or q.shape[-1] ** -0.5
            if self.on_device is None:
                paged_attention(q, self.pool, layer, self.direct, window, scale, out)
            else:
                from thornback.engine import triton_attention  # loaded only where it is used

                triton_attention.paged_attention(q, self.pool, layer, self.on_device, window, scale, out)
        self.attend_groups(layer, q, out, scaling, window)
        return out

    def attend_groups(self, layer: int, q: Tensor, out: Tensor, scaling: float | None, window: int | None) -> None:
        """Read what the sequences in `groups` own, for their rows of `q`, into those of `out`, `[T, heads, D]`."""
        for group in self.groups:
            mixed = self._read(group, layer, q.index_select(0, group.rows), scaling, window)
            if group.back is None:
                out.index_copy_(0, group.rows, mixed)
            else:
                out.index_copy_(0, group.tokens, mixed.index_select(0, group.back))

    def _read(self, group: PagedGroup, layer: int, q: Tensor, scaling: float | None, window: int | None) -> Tensor:
        _, _, _, kv_heads, block_size, d = self.pool.shape
        blocks, index = self.pool.view(-1, block_size * d), group.blocks + layer * 2 * kv_heads
        keys, values = (
            blocks.index_select(0, i).view(group.num_sequences * kv_heads, -1, d) for i in (index, index + kv_heads)
        )
        return group.attention(q, keys, values, scaling, window)

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        _, _, _, kv_heads, block_size, d = self.pool.shape
        rows, slots = self.pool.view(-1, d), self.slots + layer * 2 * kv_heads * block_size
        rows.index_copy_(0, slots, k.reshape(-1, d))
        rows.index_copy_(0, slots + kv_heads * block_size, v.reshape(-1, d))


def _tree_mask(group: PagedGroup, bases: np.ndarray, bits: np.ndarray, block_size: int) -> Tensor | None:
    """bool `[B, Q, N * block_size]`: the keys that each query of a group sees, if some are of trees."""
    shape = (group.num_sequences, group.num_queries, 1)
    queries = group.rows.cpu().numpy()  # padding repeats the first packed token, whose result nobody reads
    base, bit = bases[queries].reshape(shape), bits[queries].view(np.uint64).reshape(shape)
    if (base == NO_TREE).all():
        return None
    keys = np.arange(len(group.blocks) // (group.num_sequences * group.kv_heads) * block_size)
    named = bit >> np.clip(keys - base, 0, 63).astype(np.uint64) & np.uint64(1)
    seen = (group.positions.cpu().numpy()[:, :, None] >= keys) & ((keys < base) | (named == 1))
    return torch.from_numpy(seen).to(group.positions.device)


def _group(
    members: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    before: np.ndarray,
    table: np.ndarray,
    pool: Tensor,
) -> PagedGroup:
    _, layers, _, kv_heads, block_size, _ = pool.shape
    starts, counts, before = starts[members], counts[members], before[members]
    nth = np.arange(counts.max())
    inside = nth < counts[:, None]
    rows = np.where(inside, starts[:, None] + nth, 0).ravel()
    real = np.flatnonzero(inside)
    table = table[members, None, : -(-int((counts + before).max()) // block_size)] * (layers * 2 * kv_heads)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(pool.device)

    return PagedGroup(
        num_sequences=len(members),
        num_queries=len(nth),
        kv_heads=kv_heads,
        rows=tensor(rows),
        tokens=None if inside.all() else tensor(rows[real]),
        back=None if inside.all() else tensor(real),
        blocks=tensor((table + np.arange(kv_heads)[:, None]).ravel()),
        # A padded query takes position 0: it sees one key, so that its (unused) softmax is finite.
        positions=tensor(np.where(inside, before[:, None] + nth, 0)),
    )
