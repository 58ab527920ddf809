"""Prompt lookup: guesses from the sequence itself (RASD, papers.md section 3)."""

from __future__ import annotations

import numpy as np

from thornback.contracts import TokenForest, TokenTree
from thornback.data.lookup import look_back, look_back_all, tree_of


class PromptLookup:
    """A `BatchRetriever` over the context itself: what followed the same tokens earlier in it."""

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        if not len(context):
            return TokenTree.empty()
        return tree_of(*look_back(np.ascontiguousarray(context, np.int64), num_nodes))

    def retrieve_all(self, tokens: np.ndarray, stops: np.ndarray, num_nodes: int) -> TokenForest:
        columns, ends = look_back_all(tokens, stops, num_nodes)
        return TokenForest(columns, *ends)
