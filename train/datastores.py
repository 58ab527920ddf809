"""The jobs behind `thornback datastore`."""

from __future__ import annotations

from collections.abc import Sequence

from thornback.data import Datastore, DatastoreInfo, load_tokenizer, read_documents, tokenizer_fingerprint


def build_datastore(
    location: str, tokenizer: str, sources: Sequence[str], column: str = "text", max_bad_rows: int = 0
) -> DatastoreInfo:
    """Build a datastore of documents under the tokenizer of a model directory. Raises `DataError` for bad rows."""
    fingerprint, loaded = tokenizer_fingerprint(tokenizer), load_tokenizer(tokenizer)
    documents = read_documents(sources, loaded, column).checked(max_bad_rows)
    store = Datastore.build(documents, len(loaded), fingerprint)
    store.save(location)
    assert store.info is not None
    return store.info


def datastore_info(location: str) -> DatastoreInfo:
    """What a datastore was made of. Raises `DataError` for one that is damaged."""
    info = Datastore.open(location).info
    assert info is not None
    return info
