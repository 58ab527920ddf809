"""The prompts of the generation benchmarks: the same for every peer in the same turn, new in every turn."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from benchmarks.models import VOCABULARY


@dataclass(frozen=True)
class Workload:
    """`num_prompts` prompts; those of each of `num_prefixes` groups begin with the same `prefix_length` tokens.

    The defaults suit every peer: vLLM's blocks on CPU hold 128 tokens, and only whole blocks are shared.
    """

    num_prompts: int = 64
    num_prefixes: int = 8
    prefix_length: int = 128
    suffix_length: int = 16
    new_tokens: int = 64

    @property
    def max_length(self) -> int:
        return self.prefix_length + self.suffix_length + self.new_tokens

    def prompts(self, turn: int) -> list[list[int]]:
        """Token ids of every prompt, neighbours sharing a prefix; nothing is shared with another turn."""
        rng = random.Random(turn)

        def tokens(count: int) -> list[int]:
            return [rng.randrange(4, VOCABULARY) for _ in range(count)]

        prefixes = [tokens(self.prefix_length) for _ in range(self.num_prefixes)]
        each = -(-self.num_prompts // self.num_prefixes)
        return [prefixes[i // each] + tokens(self.suffix_length) for i in range(self.num_prompts)]

    def settings(self) -> dict[str, int]:
        """What a peer's process gets; `Workload(**settings)` there is this one."""
        return asdict(self)
