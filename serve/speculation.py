"""What replicas guess from: checked before anything starts, shared by a node's replicas (RASD, papers.md section 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from pyarrow import fs

from thornback.contracts import DataError, ModelError, Retriever
from thornback.engine.draft_files import head_refused, holds_head, is_hub_name, read_draft_config
from thornback.serve.config import SpeculationSection
from thornback.serve.model_source import TOKENIZER_FILES

if TYPE_CHECKING:  # else where it is used: it brings numba along, which a server without guesses does not need
    from thornback.data import Datastore

_ATTEMPTS, _TIMEOUT_S = 3, 120.0


def check_sources(section: SpeculationSection, model: str, engine: str) -> None:
    """Raise `DataError` or `ModelError` for a datastore or a draft that is damaged, or made for another model than the
    directory `model`; a small model must have the same tokenizer. Models of the hub, and drafts of the hub, are
    compared when a replica has loaded them, by their vocabulary's size. `ConfigError`: the engine of this name cannot
    guess by such a draft."""
    config = _config_of(model)
    if section.datastore:
        from thornback.data import Datastore, tokenizer_fingerprint

        vocab_size, fingerprint = config.get("vocab_size"), tokenizer_fingerprint(model) if config else None
        Datastore.open(section.datastore, vocab_size, fingerprint)
    if section.draft and not is_hub_name(section.draft):
        head = holds_head(read_draft_config(section.draft, config))
        if head and engine == "vllm":
            raise head_refused(section.draft)
        if config and not head:
            _compare_tokens(section.draft, model)


def _compare_tokens(draft: str, model: str) -> None:
    from thornback.data import same_tokens

    if not any(Path(draft, name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"The draft {draft} has no tokenizer to compare with the model's; save the model's there.")
    if not same_tokens(draft, model):
        raise ModelError(
            f"The draft {draft} has another tokenizer than {model}: their token ids mean different things; "
            "give a draft of the same family."
        )


def _config_of(model: str) -> dict[str, Any]:
    try:
        return json.loads(Path(model, "config.json").read_text()) if Path(model).is_dir() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}/config.json cannot be read: {error}; save the model again.") from error


def make_retrievers(section: SpeculationSection) -> tuple[tuple[Retriever, ...], Datastore | None]:
    """A replica's retrievers, and the one among them that learns from traffic, if any does."""
    if section.method == "off":
        return (), None
    from thornback.data import Datastore, PromptLookup

    store = _shared_datastore(section.datastore) if section.datastore else None
    if section.learn_from_traffic:
        store = store or Datastore()
    return (PromptLookup(), *([store] if store else ())), store if section.learn_from_traffic else None


def _shared_datastore(location: str) -> Datastore:
    """One copy a node: a local file is mapped by every replica, anything else is read once into the object store."""
    from thornback.data import Datastore, open_location

    filesystem, _ = open_location(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        return Datastore.open(location)
    for attempt in range(_ATTEMPTS):
        # It goes with the replica that made it. Others keep what they have mapped; one that comes later reads anew.
        options = {"name": f"datastore {location}", "get_if_exists": True, "num_cpus": 0}
        holder = ray.remote(_Holder).options(**options).remote(location)
        try:
            (reference,) = ray.get(holder.reference.remote(), timeout=_TIMEOUT_S)
            return Datastore.from_buffer(ray.get(reference, timeout=_TIMEOUT_S))
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            if attempt == _ATTEMPTS - 1:
                raise DataError(f"The datastore {location} cannot be shared: {error}") from error
    raise AssertionError("unreachable")


class _Holder:
    """Owns the bytes of a datastore in the object store."""

    def __init__(self, location: str) -> None:
        import numpy as np

        from thornback.data import open_location

        filesystem, path = open_location(location)
        with filesystem.open_input_file(path) as file:
            self._reference = ray.put(np.frombuffer(file.read_buffer(), np.uint8))

    def reference(self) -> list[ray.ObjectRef]:
        return [self._reference]  # in a list, or the bytes themselves would be the answer
