"""The retrieval store: look-ups in 50 million tokens of Python sources by one core, and what a node's replicas take.

The text is the standard library's and, until there are tokens enough, that of the packages in this environment, whose
versions requirements-bench.lock names; in the byte-pair encoding of the `rasd` benchmark. A context is 64 tokens: half
of them from files that are not in the store (held out by their names' hashes), half from anywhere in it.

`lookup_p99_us`: microseconds of the slowest hundredth of the look-ups, in one process on one core: the longest match of
16 to 2 tokens, and a tree of 60 nodes of what followed it (the median of the turns). `memory_4_replicas_vs_1`: what all
processes of a node take for the store, with four replicas over with one. `bytes_per_token_vs_rest`: our file's over
that of REST's published layout, 4 bytes for a token and 4 for its place in the suffix array (FasterDecoding/REST,
DraftRetriever/src/lib.rs, `dump_data`; its crate is not on PyPI, where `draftretriever` is another one).
"""

from __future__ import annotations

import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import real_text
from benchmarks.harness import QUICK_ROUNDS, ROUNDS, Peer, alternate
from benchmarks.peers.datastore import replicas
from benchmarks.results import Results, run

TOKENS, QUICK_TOKENS = 50_000_000, 1_000_000
NODES, CONTEXT, CONTEXTS = 60, 64, 20_000
REPLICAS = (1, 2, 4)
REST_BYTES = 8.0  # a token, by the layout that REST's source writes


def sources(held_out: bool) -> Iterator[str]:
    """Files' texts, those of the standard library first."""
    paths = sysconfig.get_paths()
    for root in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for path in sorted(root.rglob("*.py")):
            name = str(path.relative_to(root))
            if (zlib.crc32(name.encode()) % 12 == 0) == held_out and not (
                root == Path(paths["stdlib"]) and "site-packages" in name
            ):
                yield path.read_text(errors="replace")


def tokenized(texts: Iterator[str], most: int) -> list[np.ndarray]:
    """Documents of so many tokens together, at most, uint16."""
    backend, found, left = real_text.tokenizer().backend_tokenizer, [], most
    while some := list(islice(texts, 256)):
        for encoded in backend.encode_batch_fast(some, add_special_tokens=False):
            ids = np.array(encoded.ids[:left], np.uint16)
            if len(ids):
                found.append(ids)
                left -= len(ids)
            if not left:
                return found
    return found


def prepare(directory: Path, num_tokens: int, say: Callable[[str], None]) -> int:
    """Write what the peers read; returns how many tokens there are."""
    say(f"reading {num_tokens:,} tokens")
    stored, others = tokenized(sources(False), num_tokens), tokenized(sources(True), num_tokens // 10)
    total, rng = sum(map(len, stored)), np.random.default_rng(0)
    if total < num_tokens:
        raise RuntimeError(f"The sources of this environment are {total:,} tokens only.")
    contexts = np.empty((CONTEXTS, CONTEXT), np.int64)
    for i in range(CONTEXTS):
        of = others if i % 2 else stored
        document = of[rng.integers(len(of))]
        while len(document) <= CONTEXT:
            document = of[rng.integers(len(of))]
        at = rng.integers(len(document) - CONTEXT)
        contexts[i] = document[at : at + CONTEXT]
    np.save(directory / "tokens.npy", np.concatenate(stored))
    np.save(directory / "ends.npy", np.cumsum([len(document) for document in stored]))
    np.save(directory / "contexts.npy", contexts)
    return total


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    results = Results("datastore")
    with tempfile.TemporaryDirectory() as temporary:
        num_tokens = prepare(Path(temporary), QUICK_TOKENS if quick else TOKENS, say)
        settings: dict[str, Any] = {"directory": temporary, "vocab_size": real_text.VOCABULARY, "num_nodes": NODES}
        settings["per_turn"] = 200 if quick else 2000
        one = {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        peer = Peer("one core", "benchmarks.peers.datastore:thornback", settings, one)
        measured = alternate([peer], QUICK_ROUNDS if quick else ROUNDS, 1, say=say)[peer.name]
        say("sharing the store between replicas")
        taken = replicas(temporary, list(REPLICAS))
    bytes_per_token = measured.median("bytes") / num_tokens
    results.rows = [
        {
            "name": peer.name,
            "tokens": num_tokens,
            "threads": 1,
            "p50_us": measured.median("p50"),
            "p99_us": measured.median("p99"),
            "p999_us": measured.median("p999"),
            "found_share": measured.median("found"),
            "build_seconds": measured.median("build_seconds"),
            "bytes_per_token": bytes_per_token,
            "turns": measured.all("p99"),
        },
        {"name": "REST's published layout (not run)", "bytes_per_token": REST_BYTES},
        *({"replicas": count, "memory_per_node_mib": taken[count] / (1 << 20)} for count in REPLICAS),
    ]
    results.ratios = {
        "lookup_p99_us": measured.median("p99"),
        "memory_4_replicas_vs_1": taken[REPLICAS[-1]] / taken[1],
        "bytes_per_token_vs_rest": bytes_per_token / REST_BYTES,
    }
    return results


if __name__ == "__main__":
    run("datastore", measure)
