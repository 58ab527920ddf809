"""What RUN_OR_MODEL names: a model directory, the model of a run, or a model of the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

from thornback.contracts import ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def resolve_model(run_or_model: str | Path) -> str:
    """The model directory (absolute) or hub name that `run_or_model` stands for.

    A run directory stands for its `model/`, or while that is missing for its newest checkpoint. Looks at files
    only. Raises `ModelError` in one sentence where there is no servable model.
    """
    path = Path(run_or_model).expanduser()
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(run_or_model)) and not path.parent.is_dir():
            return str(run_or_model)
        raise ModelError(f"{run_or_model} is not a directory; give a run directory or a model in Hugging Face layout.")
    model = path if (path / "config.json").is_file() else _model_of_run(path)
    _check(model)
    return str(model.resolve())


def _model_of_run(run: Path) -> Path:
    if (run / "model").is_dir():
        return run / "model"
    steps = {int(p.name[5:]): p for p in run.glob("checkpoints/step-*") if p.name[5:].isdigit()}
    for step in sorted(steps, reverse=True):
        for place in (steps[step], steps[step] / "model"):
            if (place / "config.json").is_file():
                return place
    raise ModelError(
        f"{run} holds neither a model (config.json) nor a run with a model/ or a checkpoint; "
        "give a run directory or a model in Hugging Face layout."
    )


def _check(model: Path) -> None:
    try:
        config = json.loads((model / "config.json").read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{model} has no config.json; give a directory in Hugging Face layout.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{model / 'config.json'} cannot be read: {error}; save the model again.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{model / 'config.json'} names no model_type; give a directory in Hugging Face layout.")
    if not any(model.glob("*.safetensors")):
        raise ModelError(f"{model} has no *.safetensors weights; save the model with save_pretrained first.")
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{model} has no tokenizer; save one there with tokenizer.save_pretrained.")
