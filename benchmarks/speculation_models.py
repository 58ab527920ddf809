"""The models of the speculation benchmark, trained here on text that is not held out, and kept for the next run.

`python -m benchmarks.speculation_models` makes them: about three quarters of an hour on two cores.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import real_text
from benchmarks.models import cores

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
STEPS, BATCH, LEARNING_RATE = 1300, 8, 3e-3
_OFTEN = {"qa": 4}  # epochs of a task beside one of the others


def directory() -> Path:
    """Where models are kept: named by all that they are made of."""
    made_of = Path(real_text.__file__).read_bytes() + Path(__file__).read_bytes()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "thornback", "benchmarks", hashlib.sha256(made_of).hexdigest()[:12])


def training_examples() -> list[tuple[tuple[int, ...], int]]:
    """What the target learns from, mixed: token ids, and where the loss on them begins. Beside the tasks, whose prompts
    are learned too, strings of no meaning are said twice: to copy is what answers from a document need first."""
    rng = np.random.default_rng(1)
    parts = [real_text.examples(task, False) * _OFTEN.get(task, 1) for task in real_text.TASKS]
    mixed = [((*e.prompt, *e.answer), 1) for part in parts for e in part]
    for _ in range(len(mixed) // 12):
        said = tuple(rng.integers(20, real_text.VOCABULARY, rng.integers(16, 96)).tolist())
        mixed.append((said * 2, len(said)))
    return [mixed[i] for i in rng.permutation(len(mixed))]


def target(say: Callable[[str], None] = print) -> Path:
    """The model whose passes speculation saves: `SHAPE`, trained for `STEPS` steps."""
    path = directory() / "target"
    if not path.is_dir():
        say(f"training the target for {STEPS} steps, once")
        _train(training_examples(), path)
    return path


def _train(examples: Sequence[tuple[tuple[int, ...], int]], path: Path) -> None:
    import ray

    from thornback.train.build import build_model
    from thornback.train.sections import WarmStartSection
    from thornback.train.warm_start import Example, supervise

    start = path.with_name("untrained")
    build_model(start, real_text.tokenizer(), vocab_size=real_text.VOCABULARY, **SHAPE)
    section = WarmStartSection(steps=STEPS, batch_size=BATCH, learning_rate=LEARNING_RATE, warmup_steps=60)
    with ray.init(num_cpus=cores(), include_dashboard=False, log_to_driver=False):
        supervise(
            start,
            [Example(*example) for example in examples],
            path,
            section,
            num_threads=cores(),
            metrics_path=path.with_name("target-metrics.jsonl"),
        )
    shutil.rmtree(start)


if __name__ == "__main__":
    target()
