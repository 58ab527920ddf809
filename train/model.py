"""The model that a run starts from: given, or made from nothing; and warmed up, if the configuration says so."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from thornback.actors.locations import local_model
from thornback.contracts import ConfigError, ModelError, Task
from thornback.engine.draft_files import holds_head, read_draft_config
from thornback.train.config import RunConfig
from thornback.train.run_directory import RunDirectory

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def check_model(config: RunConfig) -> None:
    """Raise `ConfigError` or `ModelError` where there cannot be a model, before anything starts."""
    path = config.model.path
    if config.model.build is not None:
        return
    if path is None:
        raise ConfigError("model: give model.path (a model directory or a hub name) or model.build.")
    if "://" in path:
        return
    directory = Path(path)
    if not directory.is_dir():
        if directory.is_absolute() or path.startswith("."):
            raise ModelError(
                f"model.path: {path} is not a directory; give a Hugging Face model directory or a hub name."
            )
        return
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.path: {path} has no config.json; give a directory in Hugging Face layout.")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"model.path: {path} has no tokenizer; save the model's there with save_pretrained.")


def check_draft(config: RunConfig) -> None:
    """Raise `ModelError` for a draft head of the rollouts that is damaged, or was made for another model than the one
    that the run starts from, before anything starts. Models of the hub and at URIs are compared when they are loaded.
    """
    rollout, draft = config.rollout, config.rollout.rasd.draft
    if rollout.speculate == "off" or not draft:
        return
    if not holds_head(read_draft_config(local_model(draft), _sizes(config))):
        raise ModelError(
            f"rollout.rasd.draft: {draft} holds a whole model, which cannot follow the policy; train a draft head with "
            "thornback draft."
        )


def _sizes(config: RunConfig) -> dict[str, Any]:
    """What is known of the starting model's sizes, under the names of a config.json."""
    build, path = config.model.build, config.model.path
    made = Path(config.directory, "built") if build is not None else Path(path or "")
    if (made / "config.json").is_file():
        try:
            return json.loads((made / "config.json").read_text())
        except ValueError as error:
            raise ModelError(f"{made}/config.json cannot be read: {error}; save the model again.") from error
    if build is None:
        return {}
    return {
        "hidden_size": build.hidden_size,
        "num_key_value_heads": build.num_key_value_heads,
        "head_dim": build.head_dim or build.hidden_size // build.num_attention_heads,
    }


def starting_model(config: RunConfig, run: RunDirectory, task: Task) -> str:
    """A model directory or hub name. What is made here, for `task`, lies in the run's directory, and is made once."""
    if config.model.build is None:
        assert config.model.path is not None
        model = config.model.path
    else:
        model = made_once(run, "built", lambda directory: _build(config, task, directory))
    if config.warm_start is not None:
        start = model
        model = made_once(run, "warm", lambda directory: _warm_start(config, task, start, directory))
    return model


def made_once(run: RunDirectory, name: str, make: Callable[[str], None]) -> str:
    """The directory `name` of a run, which `make(local path)` fills if it is not there; whole or not at all."""
    if not run.exists(name):
        temporary = f".{name}.tmp"
        run.make_empty(temporary)
        if run.is_local:
            make(run.path(temporary))
        else:
            with tempfile.TemporaryDirectory() as directory:
                make(directory)
                pafs.copy_files(directory, run.path(temporary), destination_filesystem=run.filesystem)
        run.filesystem.move(run.path(temporary), run.path(name))
    return run.at(name)


def _build(config: RunConfig, task: Task, directory: str) -> None:
    from thornback.data.tokenizer import character_tokenizer
    from thornback.train.build import build_model

    assert config.model.build is not None
    sizes = config.model.build.model_dump(exclude={"extra_tokens"})
    tokenizer = character_tokenizer([*config.model.build.extra_tokens, *getattr(task, "words", ())])
    build_model(directory, tokenizer, **sizes, seed=config.run.seed)


def _warm_start(config: RunConfig, task: Task, model: str, directory: str) -> None:
    from thornback.train.warm_start import warm_start

    warm_start(config, task, local_model(model), directory)
