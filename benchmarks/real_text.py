"""Four tasks of real text that every machine has: the sources and documentation strings of Python's standard library.

Modules are held out by their names' hashes: what a model learns from, and what a datastore holds, comes from the
others. `code`: go on with a file. `docqa`: what does this documentation say about a word in it? `summary`: the first
sentence of each of its paragraphs. `qa`: the demo's task, column addition with its reasoning.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from thornback.data import load_task, make_demonstrations, render_prompt
from thornback.data.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, WHOLE_TOKENS

TASKS = ("code", "docqa", "summary", "qa")
VOCABULARY = 2048
_SKIPPED = ("site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings")
_HELD_OUT = 12  # one module in so many
_CODE_PROMPT, _CODE_CHUNK = 192, 448  # tokens


@dataclass(frozen=True)
class Example:
    """A prompt and the text that answers it, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@cache
def sources(held_out: bool) -> tuple[str, ...]:
    """The texts of the modules that are, or are not, held out; in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        if not set(Path(name).parts) & set(_SKIPPED) and (zlib.crc32(name.encode()) % _HELD_OUT == 0) == held_out:
            found.append(path.read_text(errors="replace"))
    return tuple(found)


def documents(held_out: bool) -> Iterator[tuple[str, str]]:
    """Names of functions, classes and modules, and their documentation, where it is more than a line."""
    for text in sources(held_out):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                doc = ast.get_docstring(node)
                if doc and 160 <= len(doc) <= 1000 and len(sentences(doc)) >= 2:
                    yield getattr(node, "name", "this module"), doc


def sentences(text: str) -> list[str]:
    """The sentences of a documentation string, each on one line."""
    flat = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [s for part in flat for s in re.split(r"(?<=[.!?:]) +(?=[A-Z`'\"(])", part) if s]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of the modules that are not held out; the chat format is the demo's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in WHOLE_TOKENS])
    added = len(SPECIAL_TOKENS) + len(WHOLE_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sources(False), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def examples(task: str, held_out: bool) -> list[Example]:
    """Every example of a task, in an order of no meaning that is always the same."""
    made = list({"code": _code, "docqa": _docqa, "summary": _summary, "qa": _qa}[task](held_out))
    return [made[i] for i in np.random.default_rng(0).permutation(len(made))]


def _ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)


def _code(held_out: bool) -> Iterator[Example]:
    for text in sources(held_out):
        ids = _ids(text)
        for start in range(0, len(ids) - _CODE_PROMPT, _CODE_CHUNK):
            chunk = ids[start : start + _CODE_CHUNK]
            if len(chunk) > _CODE_PROMPT + 32:
                yield Example(chunk[:_CODE_PROMPT], chunk[_CODE_PROMPT:])


def _chat(question: str, answer: str) -> Example:
    eos = tokenizer().eos_token_id
    return Example(tuple(render_prompt(tokenizer(), [{"role": "user", "content": question}])), (*_ids(answer), eos))


def _docqa(held_out: bool) -> Iterator[Example]:
    for number, (name, doc) in enumerate(documents(held_out)):
        rng, parts = np.random.default_rng(number), sentences(doc)
        for at in rng.permutation(len(parts))[:2]:
            words = [w for w in re.findall(r"[A-Za-z_]{5,}", parts[at]) if sum(w in part for part in parts) == 1]
            if words:
                word = words[rng.integers(len(words))]
                answer = " ".join(parts[at : at + 2])
                yield _chat(f"{doc}\n\nWhat does the documentation of {name} say about {word}?", answer)


def _summary(held_out: bool) -> Iterator[Example]:
    for name, doc in documents(held_out):
        paragraphs = [sentences(part)[0] for part in re.split(r"\n\s*\n", doc) if part.strip()]
        yield _chat(f"{doc}\n\nSummarise the documentation of {name}.", " ".join(paragraphs))


def _qa(held_out: bool) -> Iterator[Example]:
    task = load_task("arithmetic", {})
    made = make_demonstrations(task, 4000, 1 if held_out else 0)
    half = [d for d in made if (zlib.crc32(d.prompt.key.encode()) % _HELD_OUT == 0) == held_out]
    for demonstration in half:
        yield _chat(demonstration.prompt.messages[0]["content"], demonstration.completion)
