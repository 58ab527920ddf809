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
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import real_text
from benchmarks.models import cores
from thornback.contracts import EngineConfig, Request, SamplingParams
from thornback.data import Datastore, read_documents, tokenizer_fingerprint
from thornback.engine import TorchEngine, generate
from thornback.train.cluster import cluster
from thornback.train.drafts import DraftConfig, train_draft

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
STEPS, BATCH, LEARNING_RATE = 1300, 8, 3e-3
PROMPTS, NEW_TOKENS = 600, 128  # of each task, to which the target answers; its answers' tokens
DRAFT_STEPS = 1500
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


def said(say: Callable[[str], None] = print) -> Path:
    """What the target says to prompts that are not held out, as rollouts (Parquet): what the draft learns from, and,
    beside the text itself, what the datastore holds."""
    path = directory() / "said.parquet"
    if not path.is_file():
        model, rows = target(say), []
        engine = TorchEngine(str(model), EngineConfig(num_threads=cores(), max_num_seqs=64))
        for task in real_text.TASKS:
            prompts = [e.prompt for e in real_text.examples(task, False)[:PROMPTS]]
            say(f"{task}: the target answers {len(prompts)} prompts, once")
            requests = [
                Request(str(i), prompt, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.7 * (i % 2), seed=i))
                for i, prompt in enumerate(prompts)
            ]
            for key, (sample,) in generate(engine, requests).items():
                rows.append({"prompt_ids": prompts[int(key)], "response_ids": sample.token_ids.tolist()})
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def draft(say: Callable[[str], None] = print) -> Path:
    """The draft head, trained on what the target says."""
    path = directory() / "draft"
    if not path.is_dir():
        sources, model = [str(said(say))], str(target(say))
        config = DraftConfig(max_tokens=0, steps=DRAFT_STEPS, batch_size=8)
        with cluster(None):
            train_draft(model, path, sources, config, num_threads=cores(), say=say)
    return path


def datastore(say: Callable[[str], None] = print) -> Path:
    """The text that is not held out, and what the target says to its prompts, as one datastore."""
    path = directory() / "store.arrow"
    if not path.is_file():
        say("building the datastore, once")
        answers = read_documents([str(said(say))], real_text.tokenizer()).checked()
        texts = [(*e.prompt, *e.answer) for task in real_text.TASKS for e in real_text.examples(task, False)]
        store = Datastore.build([*texts, *answers], real_text.VOCABULARY, tokenizer_fingerprint(target(say)))
        store.save(str(path))
    return path


if __name__ == "__main__":
    draft()
    datastore()
