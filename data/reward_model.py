"""A sequence classifier as a reward: any of `transformers`', such as one that `thornback reward-model` has trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thornback.contracts import Completion, Message, ModelError
from thornback.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelReward:
    """What a classifier makes of each conversation: the sigmoid of its output `label`, in [0, 1].

        rewards:
          liked: {function: "thornback.data:ModelReward", options: {model: runs/liked}}

    Completions are judged in batches of equally long ones, of at most `batch_tokens` tokens with their padding. Of a
    conversation that is longer than `max_length` tokens (None: what the model holds) the end counts. Raises
    `ModelError` for what is no classifier, when it is first needed.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        model: str,
        label: int = 0,
        batch_tokens: int = 16384,
        max_length: int | None = None,
        num_threads: int | None = None,
        device: str = "auto",
    ) -> None:
        self.model_name = model
        self.label = label
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.num_threads = num_threads
        self.device = device

    def __reduce__(self) -> tuple:
        return ModelReward, (
            self.model_name, self.label, self.batch_tokens, self.max_length, self.num_threads, self.device
        )  # fmt: skip

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model_name)

    @cached_property
    def model(self) -> PreTrainedModel:
        import torch

        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        model = load_classifier(self.model_name, self.tokenizer)
        if self.label >= model.config.num_labels:
            raise ModelError(
                f"{self.model_name} has {model.config.num_labels} outputs; there is no label {self.label}."
            )
        return model.to(device).eval()

    def check(self) -> None:
        """Whether a directory holds a classifier, without loading it; the hub's are seen when they are loaded."""
        config = Path(self.model_name, "config.json")
        if not Path(self.model_name).is_dir():
            return
        kinds = json.loads(config.read_text()).get("architectures") if config.is_file() else None
        if not any("Classification" in kind for kind in kinds or ()):
            raise ModelError(f"{self.model_name} is no classifier; train one with thornback reward-model.")

    def score_all(self, completions: Sequence[Completion]) -> list[float]:
        conversations = [
            conversation(self.tokenizer, completion.prompt.messages, completion.text) for completion in completions
        ]
        return self.score_tokens(conversations).tolist()

    def score_tokens(self, conversations: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 `[R]` of token ids."""
        import torch

        longest = int(self.max_length or getattr(self.model.config, "max_position_embeddings", None) or 1 << 30)
        cut = [np.asarray(ids[-longest:], np.int64) for ids in conversations]
        scores = np.zeros(len(cut), np.float32)
        with torch.inference_mode():
            for rows in batches_of([len(ids) for ids in cut], self.batch_tokens):
                logits = classify(self.model, [cut[i] for i in rows])[:, self.label]
                scores[rows] = torch.sigmoid(logits.float()).cpu().numpy()
        return scores


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str) -> list[int]:
    """Token ids of a conversation that ends with the assistant's answer."""
    said = [*messages, {"role": "assistant", "content": answer}]
    return list(tokenizer.apply_chat_template(said, tokenize=True, return_dict=False))


def load_classifier(model: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedModel:
    """A classifier that knows its padding, in float32. Raises `ModelError` for what is none."""
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{model} cannot be loaded as a classifier: {str(error).splitlines()[0]}") from error
    if "num_labels" not in options and info["missing_keys"]:
        raise ModelError(
            f"{model} is no classifier: it has no {', '.join(sorted(info['missing_keys'])[:3])}; train one with "
            "thornback reward-model."
        )
    # By this a classifier finds where each sequence ends.
    loaded.config.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    return loaded


def batches_of(lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
    """Rows in batches of neighbours in length, of at most so many tokens with their padding, or of one row."""
    order = np.argsort(lengths, kind="stable")
    batches: list[list[int]] = []
    for row in order:
        if batches and lengths[row] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(int(row))
        else:
            batches.append([int(row)])
    return [np.array(batch) for batch in batches]


def classify(model: PreTrainedModel, sequences: Sequence[np.ndarray]) -> Any:
    """Logits `[B, labels]`; sequences are padded on the right."""
    import torch

    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), model.config.pad_token_id, np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    device = model.device
    return model(input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device)).logits
