"""A learner's memory over many batches, none of which is like another."""

from __future__ import annotations

import os
import subprocess
import sys

from thornback.engine import ACTOR_ENVIRONMENT

UPDATES, SETTLED = 70, 20
ALLOWED = 5.0  # MB; without a bound on what torch keeps for each size, this model's take 30 more

SCRIPT = """
import ctypes, sys
import numpy as np
from tests.actors.batches import learner, rollouts

class Usage(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

usage = ctypes.CDLL(None).mallinfo2
usage.restype = Usage
batch, core, rng = rollouts(sys.argv[1]), learner(sys.argv[1]), np.random.default_rng(0)
values = np.random.default_rng(0).normal(size=len(batch))
for step in range(int(sys.argv[2])):
    chosen = rng.random(len(batch)) < 0.5  # those without an advantage are not computed
    chosen[step % len(batch)] = True
    core.update(step, values * chosen, batch)
    print((usage().uordblks + usage().hblkhd) / 1e6)
"""


def test_batches_of_ever_other_sizes_take_no_more_memory(tiny_model) -> None:
    environment = {**os.environ, **ACTOR_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(tiny_model(hidden_size=128, num_hidden_layers=4, intermediate_size=384)),
        str(UPDATES),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    used = [float(line) for line in done.stdout.split()]
    assert len(used) == UPDATES
    assert max(used[SETTLED:]) - used[SETTLED] < ALLOWED
