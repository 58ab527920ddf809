"""What a rollout worker remembers: the rollouts that its guesses come from (RASD, papers.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from thornback.contracts import RolloutBatch, TokenTree, offsets_of
from thornback.data import Datastore, read_table, write_table

WAIT_SECONDS = 60.0  # for a thread that sorts a few thousand tokens, on however busy a machine


class RolloutMemory:
    """A `Retriever` over rollouts, each a document of prompt and response: what is found after the end of a prompt are
    the responses to that very prompt.

    Beyond `max_tokens` the older half is forgotten. What is found is a function of what was remembered, in order.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.clear()

    def __len__(self) -> int:
        return len(self._documents)

    def clear(self) -> None:
        """Forget everything."""
        self._documents: list[np.ndarray] = []
        self._num_tokens = 0
        self._store = Datastore()

    def remember(self, batch: RolloutBatch) -> None:
        """Add rollouts. They are sorted in the background: `wait` returns when they are found."""
        self._add([np.concatenate([batch.prompt(i), batch.response(i)]) for i in range(len(batch))])

    def load(self, location: str) -> None:
        """Add the rollouts of a Parquet file, or of a directory of them: a `RolloutBatch`'s, or what `save` wrote."""
        table = read_table(location)
        whole = "token_ids" in table.column_names
        columns = [_arrays(table[name]) for name in (["token_ids"] if whole else ["prompt_ids", "response_ids"])]
        self._add([np.concatenate(parts) for parts in zip(*columns, strict=True)])

    def save(self, location: str) -> None:
        """Write everything to a Parquet file with one list of `token_ids` a row, which `load` reads, and `thornback
        datastore build` too."""
        offsets = offsets_of([len(document) for document in self._documents])
        values = np.concatenate([np.empty(0, np.int32), *self._documents])
        write_table(pa.table({"token_ids": pa.LargeListArray.from_arrays(offsets, values)}), location)

    def wait(self) -> None:
        """Until all that is remembered is found."""
        self._store.wait(WAIT_SECONDS)

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        return self._store.retrieve(context, num_nodes)

    def _add(self, documents: Sequence[np.ndarray]) -> None:
        self._documents += documents
        self._num_tokens += sum(map(len, documents))
        if self._num_tokens > self._max_tokens:
            self._forget()
        else:
            for document in documents:
                self._store.append(document)

    def _forget(self) -> None:
        """Keep the newest rollouts, of half as many tokens as there may be."""
        newest = np.cumsum([len(document) for document in reversed(self._documents)])
        kept = int(np.searchsorted(newest, self._max_tokens // 2, side="right"))
        documents = self._documents[len(self._documents) - kept :]
        self.clear()
        self._add(documents)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column, each int32."""
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy().astype(np.int32, copy=False)
    offsets = offsets_of(lists.value_lengths().to_numpy(zero_copy_only=False))
    return [values[start:end] for start, end in pairwise(offsets.tolist())]
