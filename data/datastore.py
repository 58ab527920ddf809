"""The retrieval datastore: what followed a context in rollouts, traffic or documents (RASD, papers.md section 3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pyarrow import fs

from thornback.contracts import DataError, TokenForest, TokenTree
from thornback.data.files import open_location
from thornback.data.levels import Levels
from thornback.data.lookup import LEVELS
from thornback.data.segments import Segment
from thornback.data.suffix_array import END, join

_VERSION = 2
_SCHEMA = pa.schema([("values", pa.uint32())])
_SECONDS = 60.0  # for threads that may have millions of tokens to sort


@dataclass(frozen=True, slots=True)
class DatastoreInfo:
    """What a store was made of and for. `tokenizer`: a fingerprint, "" if unknown (see `tokenizer_fingerprint`).
    Documents without tokens do not count."""

    vocab_size: int
    tokenizer: str
    num_tokens: int
    num_documents: int
    version: int = _VERSION


class Datastore:
    """A `Retriever` over token sequences: a large part that was built once, and what was appended since.

    What it finds depends on its documents and their order alone, once `wait` has returned: a store that was built of
    them, one to which they were appended, and one that was saved and opened say the same.

    `max_tokens`: where more tokens than that were appended, the oldest of those documents are forgotten until at most
    half as many are left. None: remember all.
    """

    def __init__(
        self, built: Segment | None = None, info: DatastoreInfo | None = None, max_tokens: int | None = None
    ) -> None:
        self._built, self._info, self.max_tokens = built, info, max_tokens
        self._levels = Levels(built, max_tokens)

    @property
    def info(self) -> DatastoreInfo | None:
        """With all that is appended; None where no vocabulary is known."""
        if self._info is None:
            return None
        return replace(
            self._info,
            num_tokens=self._info.num_tokens + self._levels.num_tokens,
            num_documents=self._info.num_documents + self._levels.num_documents,
        )

    @property
    def appended(self) -> tuple[np.ndarray, ...]:
        """The documents that were appended and are not forgotten, each uint32, where `max_tokens` bounds them; without
        a bound they are not kept one by one."""
        return self._levels.documents

    @classmethod
    def build(
        cls,
        documents: Iterable[np.ndarray | Sequence[int]],
        vocab_size: int,
        tokenizer: str = "",
        max_tokens: int | None = None,
    ) -> Datastore:
        """Raises `DataError` for a token that a vocabulary of `vocab_size` does not have."""
        arrays = [_checked(document, vocab_size, f"Document {n}") for n, document in enumerate(documents, 1)]
        segment = Segment.of(join(arrays))
        return cls(segment, _info(segment, vocab_size, tokenizer), max_tokens)

    def save(self, location: str) -> None:
        """One Arrow file, at any pyarrow.fs location; it appears whole, or not at all. It holds what was built and what
        was appended. Raises `DataError` for a store without a vocabulary."""
        if self._info is None:
            raise DataError("A datastore without a vocabulary cannot be saved; make it with Datastore.build([], size).")
        self.wait(_SECONDS)
        segments = self._levels.view.segments
        whole = reduce(lambda after, before: before.merge(after), reversed(segments))
        info = _info(whole, self._info.vocab_size, self._info.tokenizer)
        schema = _SCHEMA.with_metadata({"thornback.datastore": json.dumps(asdict(info))})
        filesystem, path = open_location(location)
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(f"{path}.partial") as sink, pa.ipc.new_file(sink, schema) as writer:
            for values in (whole.tokens, *whole.orders):
                writer.write_batch(pa.record_batch([pa.array(values)], schema=schema))
        filesystem.move(f"{path}.partial", path)

    @classmethod
    def open(
        cls,
        location: str,
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        max_tokens: int | None = None,
    ) -> Datastore:
        """A local file is mapped, not read. Raises `DataError` for one that is damaged or of another vocabulary or
        tokenizer than those that are expected."""
        filesystem, path = open_location(location)
        try:
            local = isinstance(filesystem, fs.LocalFileSystem)
            source = pa.memory_map(path) if local else pa.BufferReader(filesystem.open_input_file(path).read_buffer())
        except OSError as error:
            raise DataError(f"The datastore {location} cannot be read: {str(error).splitlines()[0]}.") from error
        return cls(*_read(source, f"The datastore {location}", vocab_size, tokenizer), max_tokens)

    @classmethod
    def from_buffer(
        cls, buffer: Any, vocab_size: int | None = None, tokenizer: str | None = None, max_tokens: int | None = None
    ) -> Datastore:
        """Over a saved file's bytes, which are not copied: how the replicas of a node share one."""
        source = pa.BufferReader(pa.py_buffer(buffer))
        return cls(*_read(source, "A shared datastore", vocab_size, tokenizer), max_tokens)

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        """What followed the longest match of the last 16 to 2 tokens, in whichever parts of the store it occurs. Of
        equally frequent continuations the one that was seen last comes first."""
        return self._levels.view.retrieve(context, num_nodes)

    def retrieve_all(self, tokens: np.ndarray, stops: np.ndarray, num_nodes: int) -> TokenForest:
        """The same for several contexts: see `BatchRetriever`."""
        return self._levels.view.retrieve_all(tokens, stops, num_nodes)

    def append(self, token_ids: np.ndarray | Sequence[int]) -> None:
        """Add a document; look-ups find it within a second. Raises `DataError` for a token that the vocabulary does not
        have, and `RuntimeError` once a thread that sorts has failed."""
        document = _checked(token_ids, int(END) if self._info is None else self._info.vocab_size, "What is appended")
        if len(document):
            self._levels.append(document)

    def wait(self, seconds: float = 10.0) -> None:
        """Until everything that was appended is found. Raises `TimeoutError`, and `RuntimeError` as `append` does."""
        self._levels.wait(seconds)

    def close(self) -> None:
        """End the threads that sort what was appended; what is not found yet is lost. Look-ups may go on."""
        self._levels.close(_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tokenizer_fingerprint(model: str | Path) -> str:
    """Of a model directory's tokenizer file, so that a store is not read with another one."""
    try:
        return hashlib.sha256((Path(model) / "tokenizer.json").read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{model} has no tokenizer.json; give a model directory that holds its tokenizer.") from error


def _checked(document: np.ndarray | Sequence[int], vocab_size: int, name: str) -> np.ndarray:
    """uint32."""
    array = np.asarray(document, np.int64)
    if len(array) and not (array.min() >= 0 and array.max() < vocab_size):
        raise DataError(f"{name} holds a token that a vocabulary of {vocab_size} does not have.")
    return array.astype(np.uint32)


def _info(segment: Segment, vocab_size: int, tokenizer: str) -> DatastoreInfo:
    num_documents = int(np.count_nonzero(segment.tokens == END))
    return DatastoreInfo(vocab_size, tokenizer, len(segment) - num_documents, num_documents)


def _read(
    source: pa.NativeFile, name: str, vocab_size: int | None, tokenizer: str | None
) -> tuple[Segment, DatastoreInfo]:
    try:
        file = pa.ipc.open_file(source)
        description = json.loads(file.schema.metadata[b"thornback.datastore"])
        version = description.get("version")
        if version != _VERSION:
            raise DataError(f"{name} has format {version}, but this version reads {_VERSION}; build it again.")
        info = DatastoreInfo(**description)
        if file.schema.names != _SCHEMA.names or file.schema.types != _SCHEMA.types:
            raise ValueError(f"columns {file.schema.names}")
        # Views of the source.
        tokens, *orders = (file.get_batch(i).column(0).to_numpy() for i in range(1 + LEVELS))
    except (pa.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{name} is damaged or no datastore; build it again.") from error
    if not len(tokens) == len(orders[0]) == info.num_tokens + info.num_documents:
        raise DataError(f"{name} holds {len(tokens)} places where its description says otherwise; build it again.")
    if vocab_size is not None and info.vocab_size > vocab_size:  # a model's may be padded
        raise DataError(f"{name} is of a vocabulary of {info.vocab_size} tokens, but the model's has {vocab_size}.")
    if tokenizer is not None and info.tokenizer != tokenizer:
        raise DataError(f"{name} was built with another tokenizer than the model's; build it with the model's own.")
    return Segment(tokens, tuple(orders)), info
