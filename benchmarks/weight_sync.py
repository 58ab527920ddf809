"""New weights to every rollout worker of a node: a model of 100M parameters in float32, one learner, four workers.

`vs_memcpy`: the time from asking the learner to publish until the last worker has loaded, over that of one memory
copy of as many bytes, in steady state with a preallocated object store (RAY_preallocate_plasma_memory=1); the store
as Ray makes it otherwise stands beside it. `memory_copies`: what the weights take in memory for all workers together,
over one copy: their parameters are views of the one mapped buffer. Counted are the bytes of the store's file that
their parameters map, each once, and all private memory that they have beyond a worker with a tiny model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import QUICK_ROUNDS, ROUNDS, Peer, alternate
from benchmarks.models import benchmark_model
from benchmarks.results import Results, run

COPY, PREALLOCATED, STOCK = "one memory copy", "preallocated store", "stock store"
NUM_WORKERS = 4
VERSIONS_IN_STORE = 5  # two kept, two mapped a moment longer, one being written


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    size = "10M" if quick else "100M"
    with tempfile.TemporaryDirectory() as directory:
        model = benchmark_model(Path(directory), size)
        nbytes = (Path(model) / "model.safetensors").stat().st_size
        settings: dict[str, Any] = {
            "model": model,
            "small_model": benchmark_model(Path(directory), "0.1M"),
            "num_workers": NUM_WORKERS,
            "store_bytes": VERSIONS_IN_STORE * nbytes + (100 << 20),
        }
        target = "benchmarks.peers.thornback_weights:sync"
        turns = alternate(
            [
                Peer(COPY, "benchmarks.peers.thornback_weights:copy", {"nbytes": nbytes}),
                Peer(PREALLOCATED, target, settings, {"RAY_preallocate_plasma_memory": "1"}),
                Peer(STOCK, target, settings, {"RAY_preallocate_plasma_memory": None}),
            ],
            QUICK_ROUNDS if quick else ROUNDS,
            warmups=VERSIONS_IN_STORE + 1,  # steady state: the store has been through its memory once
            say=say,
        )
    one = turns[COPY].median("seconds")
    results = Results("weight_sync")
    for name, measured in turns.items():
        row = {
            "name": name,
            "model": size,
            "megabytes": nbytes / 1e6,
            "milliseconds": measured.median("seconds") * 1e3,
            "over_one_copy": measured.median("seconds") / one,
        }
        if name != COPY:
            copies = [(v["mapped_bytes"] + v["private_bytes"]) / nbytes for v in measured.values]
            row |= {
                "publishing_milliseconds": measured.median("publishing") * 1e3,
                "memory_copies": median(copies),
                "private_parameter_bytes": int(max(measured.all("private_parameter_bytes"))),
            }
        results.rows.append(row | {"turns": measured.all("seconds")})
    chosen = next(row for row in results.rows if row["name"] == PREALLOCATED)
    results.ratios = {"vs_memcpy": chosen["over_one_copy"], "memory_copies": chosen["memory_copies"]}
    return results


if __name__ == "__main__":
    run("weight_sync", measure)
