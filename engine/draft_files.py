"""What a draft's directory must hold, a head's or a whole model's, and for which model; read without torch, before
anything starts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from thornback.contracts import ConfigError, ModelError

ARCHITECTURE, WEIGHTS = "ThornbackDraftHead", "model.safetensors"
_ALIKE = ("hidden_size", "vocab_size", "num_key_value_heads", "head_dim")  # in a head and its target
_GIVE = "give a directory that thornback draft has written, or a small model's with the same tokenizer"


def is_hub_name(draft: str | Path) -> bool:
    """Whether a draft is named as a model of the hub, and not by a directory."""
    path = Path(draft)
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(draft))) and not path.is_dir() and not path.parent.is_dir()


def holds_head(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a draft head's, and not a whole model's."""
    return config.get("architectures") == [ARCHITECTURE]


def head_refused(draft: str | Path) -> ConfigError:
    """What to say of a draft head to vLLM, which shows no proposer the hidden states that it reads."""
    return ConfigError(
        f"{draft} is a draft head, which reads the hidden states of its model; vLLM shows them to nobody. Give a "
        "small model as the draft, none at all, or take the torch engine."
    )


def read_draft_config(directory: str | Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """A draft's config.json. Raises `ModelError` if the directory holds none or a damaged one, weights that cannot be
    read, or a draft for another model than `target`, of which it compares what is given."""
    path = Path(directory)
    try:
        found = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"The draft {directory} has no readable config.json; {_GIVE}.") from error
    head = isinstance(found, dict) and holds_head(found)
    if not head and not (isinstance(found, dict) and "model_type" in found):
        raise ModelError(f"{directory} holds neither a draft head nor a model; {_GIVE}.")
    if head:
        _compare_head(directory, found, target)
    else:
        check_vocabulary(directory, found.get("vocab_size"), target.get("vocab_size"))
    try:
        for name in [WEIGHTS] if head else _weight_files(path):
            with safe_open(path / name, framework="numpy") as weights:
                weights.keys()
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "train it again with thornback draft" if head else "copy or save the model again"
        raise ModelError(f"The draft {directory} is damaged: {reason}; {remedy}.") from error
    return found


def _compare_head(directory: str | Path, found: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    for name in _ALIKE:
        if name in target and found.get(name) != target[name]:
            raise ModelError(
                f"The draft {directory} was made for another model: its {name} is {found.get(name)}, but the model's "
                f"is {target[name]}; train one for this model with thornback draft."
            )


def check_vocabulary(draft: str | Path, vocab_size: int | None, target: int | None) -> None:
    """Raise `ModelError` if a small model's vocabulary is another one than its target's; None: not known here."""
    if vocab_size is not None and target is not None and vocab_size != target:
        raise ModelError(
            f"The draft {draft} has a vocabulary of {vocab_size} tokens, but the model has {target}; "
            "give a draft of the same family."
        )


def _weight_files(path: Path) -> list[str]:
    """Names of the safetensors files of a model."""
    index = path / f"{WEIGHTS}.index.json"
    return sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS]
