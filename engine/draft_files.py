"""What a draft head's directory must hold, and for which model; read without torch, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from thornback.contracts import ModelError

ARCHITECTURE, WEIGHTS = "ThornbackDraftHead", "model.safetensors"
_ALIKE = ("hidden_size", "vocab_size", "num_key_value_heads", "head_dim")  # in a head and its target


def read_draft_config(directory: str | Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """A head's config.json. Raises `ModelError` if the directory holds none or a damaged one, or one for another model
    than `target`, of which it compares what is given."""
    path = Path(directory)
    try:
        found = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The draft {directory} has no readable config.json; give a directory that thornback draft has written."
        ) from error
    if found.get("architectures") != [ARCHITECTURE]:
        raise ModelError(f"{directory} holds no draft head; give a directory that thornback draft has written.")
    for name in _ALIKE:
        if name in target and found.get(name) != target[name]:
            raise ModelError(
                f"The draft {directory} was made for another model: its {name} is {found.get(name)}, but the model's "
                f"is {target[name]}; train one for this model with thornback draft."
            )
    try:
        with safe_open(path / WEIGHTS, framework="numpy") as weights:
            weights.keys()
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"The draft {directory} is damaged: {reason}; train it again with thornback draft.") from error
    return found
