"""What an engine guesses before each pass, and how often it was right (RASD, papers.md section 3)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from thornback.algorithms import depths, fuse, prune, subtree
from thornback.contracts import Retriever, SpeculationConfig, TokenTree
from thornback.engine.sequence import Sequence


class Speculation:
    """Gives the sequences that decode their drafts. Counts what vLLM's metrics count: `num_drafts` trees of
    `num_draft_tokens` nodes, of which `num_accepted_tokens` were right."""

    def __init__(self, config: SpeculationConfig | None, retrievers: tuple[Retriever, ...], max_model_len: int) -> None:
        self._config, self._retrievers, self._max_model_len = config, retrievers, max_model_len
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0

    def count(self, num_nodes: int, num_accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += num_nodes
        self.num_accepted_tokens += num_accepted

    def propose(self, sequences: Iterable[Sequence]) -> None:
        """Give each sequence whose next pass draws one token the tree to be verified in it."""
        if self._config is None or not self._retrievers:
            return
        for seq in sequences:
            # A grammar allows after each node what only it knows: such sequences go on token by token.
            if len(seq.token_ids) - seq.num_computed_tokens == 1 and seq.grammar is None:
                seq.draft = self._tree(seq, self._config)

    def _tree(self, seq: Sequence, config: SpeculationConfig) -> TokenTree | None:
        room = (
            min(seq.request.sampling.max_tokens - seq.num_output_tokens, self._max_model_len - len(seq.token_ids)) - 1
        )
        if room < 1:
            return None
        context = np.asarray(seq.token_ids[-config.max_lookback :], np.int32)
        found = [retriever.retrieve(context, config.num_nodes) for retriever in self._retrievers]
        tokens, parents, weights = fuse([(tree.tokens, tree.parents, tree.weights) for tree in found])
        weights[depths(parents) > room] = 0  # behind the last token that may be drawn
        kept = prune(tokens, parents, weights, config.num_nodes)
        return TokenTree(*subtree(tokens, parents, kept), weights[kept]) if len(kept) else None
