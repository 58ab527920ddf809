"""Full-text search: BM25 over documents, which environments offer as a tool."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class SearchIndex:
    """BM25 (bm25s, Lucene's variant) over documents. The same documents and query always give the same answer."""

    def __init__(self, documents: Sequence[str]) -> None:
        import bm25s

        self.documents = tuple(documents)
        self._bm25s = bm25s
        self._index = bm25s.BM25()
        self._index.index(self._words(self.documents), show_progress=False)
        self.search = lru_cache(maxsize=1 << 14)(self._search)  # rollouts of a prompt ask the same

    def __reduce__(self) -> tuple:
        return SearchIndex, (self.documents,)

    def _search(self, query: str, k: int) -> tuple[str, ...]:
        """At most `k` documents that share a word with `query`, best first, and of equals the earlier first."""
        words = self._words([query])[0]
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return ()
        scores = self._index.get_scores(known)
        best = np.argsort(-scores, kind="stable")[:k] if len(scores) <= 4096 else _top(scores, k)
        return tuple(self.documents[i] for i in best if scores[i] > 0)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        return self._bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """As a stable sort has it, without sorting a whole corpus."""
    bound = np.partition(scores, -k)[-k] if k < len(scores) else scores.min()
    candidates = np.flatnonzero(scores >= bound)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
