"""Who owns which block of the KV pool, and which full blocks can be used again for the same prefix."""

from __future__ import annotations

import itertools
from collections import OrderedDict

from thornback.algorithms import SegmentAllocator
from thornback.engine.sequence import Sequence


class BlockManager:
    """Reference-counted blocks over a segment allocator, and a prefix cache.

    A full block is known by `(node of the block before it, its tokens)`, looked up by hash and compared by
    value, so that two prefixes never share a block by a collision. Blocks that nobody refers to any more stay
    in the cache, as the least recently used ones first to go, until the allocator runs short.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.allocator = SegmentAllocator(num_blocks)
        self.ref_count = [0] * num_blocks
        self._drafted = [False] * num_blocks
        self._node_ids = itertools.count(1)
        self._cached: dict[tuple[int | str | None, tuple[int, ...]], tuple[int, int]] = {}  # key -> block, node
        self._key_of: dict[int, tuple] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return self.allocator.num_free + len(self._evictable)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def reuse_prefix(self, seq: Sequence) -> None:
        """Give a sequence without blocks the cached blocks of its prefix; at least one token stays to compute."""
        if not (self.enable_prefix_caching and seq.cacheable):
            return
        size, tokens = self.block_size, seq.token_ids
        node: int | str | None = seq.request.adapter
        for i in range((len(tokens) - 1) // size):
            found = self._cached.get((node, tuple(tokens[i * size : (i + 1) * size])))
            if found is None:
                break
            block, node = found
            self._acquire(block)
            seq.block_table.append(block)
        seq.num_hashed_blocks = len(seq.block_table)
        seq.num_computed_tokens = seq.num_cached_tokens = len(seq.block_table) * size
        seq.prefix_node = node  # type: ignore[assignment]
        drafted = itertools.takewhile(self._drafted.__getitem__, seq.block_table)
        seq.num_drafted_tokens = sum(1 for _ in drafted) * size

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for the keys and values of the first `num_tokens` tokens. False, and nothing done, if short."""
        missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if missing <= 0:
            return True
        if missing > self.num_free:
            return False
        seq.block_table += self.allocate(missing, after=seq.block_table[-1] if seq.block_table else None)
        return True

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Take back the blocks behind those of the first `num_tokens` tokens."""
        kept = self.blocks_for(num_tokens)
        self.release(seq.block_table[kept:])
        del seq.block_table[kept:]

    def allocate(self, num_blocks: int, after: int | None = None) -> list[int]:
        """Fresh blocks with one reference each, in as few segments as possible."""
        while self.allocator.num_free < num_blocks:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
            self.allocator.release([block])
        blocks = self.allocator.allocate(num_blocks, after=after)
        for block in blocks:
            self.ref_count[block] = 1
            self._drafted[block] = False
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One more reference to blocks in use."""
        for block in blocks:
            self.ref_count[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One reference less. The tail goes first, so that a prefix outlives what hangs on it."""
        for block in reversed(blocks):
            self.ref_count[block] -= 1
            if self.ref_count[block]:
                continue
            if block in self._key_of:
                self._evictable[block] = None
            else:
                self.allocator.release([block])

    def remember(self, seq: Sequence, num_tokens: int) -> None:
        """Enter the blocks that the coming pass fills, up to `num_tokens` tokens, into the prefix cache.

        The pass writes all keys and values of a layer before it reads any, so that sequences which begin alike
        share blocks even within one pass.
        """
        size = self.block_size
        if num_tokens // size <= seq.num_hashed_blocks or not (self.enable_prefix_caching and seq.cacheable):
            return
        for i in range(seq.num_hashed_blocks, num_tokens // size):
            parent = seq.prefix_node if i else seq.request.adapter
            key = (parent, tuple(seq.token_ids[i * size : (i + 1) * size]))
            known = self._cached.get(key)
            if known is None:
                known = (seq.block_table[i], next(self._node_ids))
                self._cached[key] = known
                self._key_of[seq.block_table[i]] = key
            seq.prefix_node = known[1]
            seq.num_hashed_blocks = i + 1

    def draft_is_in(self, blocks: list[int]) -> None:
        """The draft's keys and values of all tokens of these blocks are in."""
        for block in blocks:
            self._drafted[block] = True

    def flush(self) -> None:
        """Forget every prefix, also of blocks in use."""
        self._cached.clear()
        self._key_of.clear()
        self.allocator.release(self._evictable)
        self._evictable.clear()

    def _acquire(self, block: int) -> None:
        self._evictable.pop(block, None)
        self.ref_count[block] += 1

    def _forget(self, block: int) -> None:
        del self._cached[self._key_of.pop(block)]
