"""A task's prompts as token ids, once for the whole run."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from thornback.actors.locations import local_model
from thornback.contracts import DataError, Task
from thornback.data import load_tokenizer, render_prompt
from thornback.train.config import RunConfig
from thornback.train.prompts import TokenizedPrompt


def tokenize_prompts(
    config: RunConfig, task: Task, model: str, split: str, count: int | None
) -> tuple[list[TokenizedPrompt], list[str]]:
    """The first `count` prompts of a split (None: all) that leave room for an answer in the model's context, and where
    the others stand (file and row, or the prompt's key). Raises `DataError` if none is left."""
    model = local_model(model)
    tokenizer = load_tokenizer(model)
    context = context_length(model)
    room = [config.data.max_prompt_tokens, None if context is None else context - config.rollout.max_tokens]
    limit = min((n for n in room if n is not None), default=None)
    kept: list[TokenizedPrompt] = []
    too_long: list[str] = []
    for prompt in islice(task.prompts(split), count):
        ids = render_prompt(tokenizer, prompt.messages, task.system_prompt, prompt.tools)
        if limit is not None and len(ids) > limit:
            too_long.append(f"{prompt.extra.get('source', prompt.key)} ({len(ids)} tokens)")
        else:
            kept.append(TokenizedPrompt(prompt, tuple(ids)))
    if not kept:
        why = (
            f"all {len(too_long)} are longer than {limit} tokens, {too_long[0]} first" if too_long else "there are none"
        )
        raise DataError(f"The task {task.name} has no usable prompts in {split}: {why}.")
    return kept, too_long


def context_length(model: str) -> int | None:
    """The longest context of a model, in tokens, if its configuration says."""
    file = Path(model, "config.json")
    if not file.is_file():
        from transformers import AutoConfig

        return getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    values = json.loads(file.read_text())
    return {**values, **values.get("text_config", {})}.get("max_position_embeddings")
