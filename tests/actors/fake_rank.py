"""What stands in for a learner's first rank. A module of its own: its actors need no torch, and start without."""

from __future__ import annotations

import numpy as np
import ray

from thornback.contracts import weight_index


class FakeRank:
    """Hands out buffers as a learner's first rank does: `size` bytes of one tensor."""

    def __init__(self, size):
        self.buffer = np.zeros(size, np.uint8)
        self.index = weight_index([("w", "float32", (size // 4,))])[0]

    @ray.method(num_returns=2)
    def weights(self):
        self.buffer += 1
        return self.buffer, self.index
