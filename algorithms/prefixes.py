"""Which replica has computed which beginnings of prompts: what a prefix cache holds, seen from outside. Pure."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Sequence

Key = int


class PrefixIndex:
    """Beginnings of whole blocks, as far back as a replica's cache reaches: the least recently used are forgotten, as
    they are there. A guess, since what is forgotten there first also depends on what its requests hold."""

    def __init__(self, block_size: int) -> None:
        """`block_size`: tokens of a block of the caches."""
        self._block_size = block_size
        self._capacity: dict[str, int] = {}  # blocks
        self._held: dict[str, OrderedDict[Key, None]] = {}  # by node, the least recently used first
        self._holders: defaultdict[Key, set[str]] = defaultdict(set)

    def add_node(self, node_id: str, num_tokens: int) -> None:
        """A node whose cache holds so many tokens; what one of that name held is forgotten."""
        self.remove_node(node_id)
        self._capacity[node_id] = num_tokens // self._block_size
        self._held[node_id] = OrderedDict()

    def remove_node(self, node_id: str) -> None:
        """Its cache is gone."""
        self._capacity.pop(node_id, None)
        for key in self._held.pop(node_id, ()):
            self._drop(key, node_id)

    def keys(self, token_ids: Sequence[int], of: Hashable = None) -> list[Key]:
        """One for each beginning of whole blocks, the shortest first. A last token that must be computed anyway begins
        no block. `of`: what keys and values depend on besides, such as the version of the weights."""
        keys, key = [], hash(of)
        for end in range(self._block_size, len(token_ids), self._block_size):
            key = hash((key, *token_ids[end - self._block_size : end]))
            keys.append(key)
        return keys

    def hits(self, keys: Sequence[Key]) -> dict[str, int]:
        """How many tokens of this prompt each node holds; those that hold none are left out."""
        found: dict[str, int] = {}
        holders: set[str] | None = None
        for i, key in enumerate(keys):
            there = self._holders.get(key, set())
            holders = there if holders is None else holders & there
            if not holders:
                break
            for node_id in holders:
                found[node_id] = (i + 1) * self._block_size
        return found

    def computed(self, node_id: str, keys: Sequence[Key]) -> None:
        """A node has these now; nothing happens if it is not known."""
        held = self._held.get(node_id)
        if held is None:
            return
        for key in reversed(keys):  # the beginning is the last to be forgotten
            held[key] = None
            held.move_to_end(key)
            self._holders[key].add(node_id)
        while len(held) > self._capacity[node_id]:
            self._drop(held.popitem(last=False)[0], node_id)

    def _drop(self, key: Key, node_id: str) -> None:
        self._holders[key].discard(node_id)
        if not self._holders[key]:
            del self._holders[key]
