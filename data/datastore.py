"""The retrieval datastore: what followed a context in rollouts, traffic or documents (RASD, papers.md section 3)."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from thornback.contracts import DataError, TokenTree
from thornback.data.files import open_location
from thornback.data.suffix_array import DEPTH, continuations, earlier, join, longest_match, merge, sort_places

_VERSION = 1
_SHARE = 64  # matches of which the continuations are read
_LENGTH = 20  # tokens of each
_LARGE = 1 << 20  # tokens of the recent part that become a segment of their own


@dataclass(frozen=True, slots=True)
class Segment:
    """Documents with their suffix array, both uint32 `[T]`; they may be views of a mapped file."""

    tokens: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[np.ndarray]) -> Segment:
        tokens = join(documents)
        return cls(tokens, sort_places(tokens) if len(tokens) else tokens)


@dataclass(frozen=True, slots=True)
class DatastoreInfo:
    """What a store was made of and for. `tokenizer`: a fingerprint, "" if unknown (see `tokenizer_fingerprint`)."""

    vocab_size: int
    tokenizer: str
    num_tokens: int
    num_documents: int
    version: int = _VERSION


class Datastore:
    """A `Retriever` over token sequences: a large part that was built once, and what was appended since.

    `append` is heard within a second: a thread sorts what is new; look-ups go on with what was there.
    """

    def __init__(self, segments: Sequence[Segment] = (), info: DatastoreInfo | None = None) -> None:
        self._segments: tuple[Segment, ...] = tuple(segments)
        self._recent: list[np.ndarray] = []
        self._new = threading.Condition()
        self._thread: threading.Thread | None = None
        self._published = 0  # documents of `_recent` that look-ups find
        self.info = info

    @classmethod
    def build(cls, documents: Iterable[np.ndarray | Sequence[int]], vocab_size: int, tokenizer: str = "") -> Datastore:
        """Raises `DataError` for a token that a vocabulary of `vocab_size` does not have."""
        arrays = [np.asarray(document, np.int64) for document in documents]
        for number, array in enumerate(arrays, 1):
            if len(array) and not (array.min() >= 0 and array.max() < vocab_size):
                raise DataError(f"Document {number} holds a token that a vocabulary of {vocab_size} does not have.")
        segment = Segment.of(arrays)
        return cls((segment,), DatastoreInfo(vocab_size, tokenizer, sum(map(len, arrays)), len(arrays)))

    def save(self, location: str) -> None:
        """One Arrow file, at any pyarrow.fs location; it appears whole, or not at all. It holds what was built."""
        (segment,), info = self._segments, self.info
        assert info is not None
        names = ("tokens", "order")
        columns = [pa.array(segment.tokens), pa.array(segment.order)]
        schema = pa.schema([(name, pa.uint32()) for name in names], {"thornback.datastore": json.dumps(asdict(info))})
        filesystem, path = open_location(location)
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(f"{path}.partial") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        filesystem.move(f"{path}.partial", path)

    @classmethod
    def open(cls, location: str, vocab_size: int | None = None, tokenizer: str | None = None) -> Datastore:
        """A local file is mapped, not read. Raises `DataError` for one that is damaged or of another vocabulary or
        tokenizer than those that are expected."""
        filesystem, path = open_location(location)
        try:
            local = isinstance(filesystem, fs.LocalFileSystem)
            source = pa.memory_map(path) if local else pa.BufferReader(filesystem.open_input_file(path).read_buffer())
        except OSError as error:
            raise DataError(f"The datastore {location} cannot be read: {str(error).splitlines()[0]}.") from error
        return cls._read(source, f"The datastore {location}", vocab_size, tokenizer)

    @classmethod
    def from_buffer(cls, buffer: Any, vocab_size: int | None = None, tokenizer: str | None = None) -> Datastore:
        """Over a saved file's bytes, which are not copied: how the replicas of a node share one."""
        return cls._read(pa.BufferReader(pa.py_buffer(buffer)), "A shared datastore", vocab_size, tokenizer)

    @classmethod
    def _read(cls, source: pa.NativeFile, name: str, vocab_size: int | None, tokenizer: str | None) -> Datastore:
        try:
            batch = pa.ipc.open_file(source).get_batch(0)
            info = DatastoreInfo(**json.loads(batch.schema.metadata[b"thornback.datastore"]))
            tokens, order = (batch[column].to_numpy() for column in ("tokens", "order"))  # views of the source
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{name} is damaged or no datastore; build it again.") from error
        if info.version != _VERSION:
            raise DataError(f"{name} has format {info.version}, but this version reads {_VERSION}; build it again.")
        if len(tokens) != info.num_tokens + info.num_documents:
            raise DataError(f"{name} holds {len(tokens)} places where its description says otherwise; build it again.")
        if vocab_size is not None and info.vocab_size > vocab_size:  # a model's may be padded
            raise DataError(f"{name} is of a vocabulary of {info.vocab_size} tokens, but the model's has {vocab_size}.")
        if tokenizer is not None and info.tokenizer != tokenizer:
            raise DataError(f"{name} was built with another tokenizer than the model's; build it with the model's own.")
        return cls((Segment(tokens, order),), info)

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        """What followed the longest match of the last 16 to 2 tokens, in whichever parts of the store it occurs."""
        context = np.ascontiguousarray(context[-DEPTH:], np.int64)
        found = [(s, *longest_match(s.tokens, s.order, context, 2, DEPTH)) for s in self._segments if len(s.order)]
        longest = max((match for _, match, _, _ in found), default=0)
        if not longest:
            return TokenTree.empty()
        paths, weights = [], []
        for segment, match, first, last in found:
            if match == longest:
                paths.append(continuations(segment.tokens, segment.order, first, last, match, _SHARE, _LENGTH))
                weights.append(np.full(len(paths[-1]), (last - first) / len(paths[-1]), np.float32))
        return merge(np.concatenate(paths), np.concatenate(weights), num_nodes, longest)

    # What is appended

    def append(self, token_ids: np.ndarray | Sequence[int]) -> None:
        """Add a document; look-ups find it within a second."""
        with self._new:
            self._recent.append(np.asarray(token_ids, np.int64))
            if self._thread is None:
                self._settled = self._segments
                self._thread = threading.Thread(target=self._sort_recent, name="datastore", daemon=True)
                self._thread.start()
            self._new.notify_all()

    def wait(self, seconds: float = 10.0) -> None:
        """Until everything that was appended is found. Raises `TimeoutError`."""
        with self._new:
            if not self._new.wait_for(lambda: self._published == len(self._recent), seconds):
                raise TimeoutError(f"The datastore has not sorted what was appended within {seconds:.0f} s.")

    def _sort_recent(self) -> None:
        while True:
            with self._new:
                self._new.wait_for(lambda: self._published < len(self._recent))
                documents = list(self._recent)
            segment = Segment.of(documents)
            with self._new:
                self._segments = (*self._settled, segment)
                if len(segment.tokens) >= _LARGE:
                    self._settled, self._recent = self._segments, self._recent[len(documents) :]
                    documents = []
                self._published = len(documents)
                self._new.notify_all()


class PromptLookup:
    """A `Retriever` over the context itself: what followed the same tokens earlier in it."""

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        paths, match = earlier(np.ascontiguousarray(context, np.int64), 2, DEPTH, _SHARE, _LENGTH)
        return merge(paths, np.ones(len(paths), np.float32), num_nodes, match)


def tokenizer_fingerprint(model: str | Path) -> str:
    """Of a model directory's tokenizer file, so that a store is not read with another one."""
    try:
        return hashlib.sha256((Path(model) / "tokenizer.json").read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{model} has no tokenizer.json; give a model directory that holds its tokenizer.") from error
