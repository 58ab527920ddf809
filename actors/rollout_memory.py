"""What a rollout worker remembers: the rollouts that its guesses come from (RASD, papers.md section 3)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from thornback.contracts import RolloutBatch, TokenForest, TokenTree, offsets_of
from thornback.data import Datastore, read_table, write_table

WAIT_SECONDS = 60.0  # for a thread that sorts a few thousand tokens, on however busy a machine


class RolloutMemory:
    """A `BatchRetriever` over rollouts, each a document of prompt and response: what is found after the end of a prompt
    are the responses to that very prompt.

    Beyond `max_tokens` the older half is forgotten. What is found is a function of what was remembered, in order.
    """

    def __init__(self, max_tokens: int) -> None:
        self._store = Datastore(max_tokens=max_tokens)

    def __len__(self) -> int:
        return len(self._store.appended)

    def clear(self) -> None:
        """Forget everything."""
        self._store.close()
        self._store = Datastore(max_tokens=self._store.max_tokens)

    def remember(self, batch: RolloutBatch) -> None:
        """Add rollouts. They are sorted in the background: `wait` returns when they are found."""
        for i in range(len(batch)):
            self._store.append(np.concatenate([batch.prompt(i), batch.response(i)]))

    def load(self, location: str) -> None:
        """Add the rollouts of a Parquet file, or of a directory of them: a `RolloutBatch`'s, or what `save` wrote."""
        table = read_table(location)
        whole = "token_ids" in table.column_names
        columns = [_arrays(table[name]) for name in (["token_ids"] if whole else ["prompt_ids", "response_ids"])]
        for parts in zip(*columns, strict=True):
            self._store.append(np.concatenate(parts))

    def save(self, location: str) -> None:
        """Write everything to a Parquet file with one list of `token_ids` a row, which `load` reads, and `thornback
        datastore build` too."""
        documents = self._store.appended
        offsets = offsets_of([len(document) for document in documents])
        values = np.concatenate([np.empty(0, np.uint32), *documents]).astype(np.int32)
        write_table(pa.table({"token_ids": pa.LargeListArray.from_arrays(offsets, values)}), location)

    def wait(self) -> None:
        """Until all that is remembered is found."""
        self._store.wait(WAIT_SECONDS)

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        return self._store.retrieve(context, num_nodes)

    def retrieve_all(self, tokens: np.ndarray, stops: np.ndarray, num_nodes: int) -> TokenForest:
        return self._store.retrieve_all(tokens, stops, num_nodes)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column, each int32."""
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy().astype(np.int32, copy=False)
    offsets = offsets_of(lists.value_lengths().to_numpy(zero_copy_only=False))
    return [values[start:end] for start, end in pairwise(offsets.tolist())]
