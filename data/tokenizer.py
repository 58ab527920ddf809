"""A character tokenizer for tiny models, and the one way in which a prompt becomes token ids."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from thornback.contracts import ConfigError, DataError

# ChatML, as Qwen's models use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", None)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
# One token each, so that a tiny model has less to spell. They are text: decoding keeps them.
WHOLE_TOKENS = (
    *("system", "user", "assistant", "tool"),
    *("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"),
    *("<search>", "</search>", "<information>", "</information>"),
)


def character_tokenizer(extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character; roles, tags and `extra_tokens` are one token each."""
    vocabulary = [*SPECIAL_TOKENS, *WHOLE_TOKENS, *extra_tokens, *sorted(set(string.printable))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*WHOLE_TOKENS, *extra_tokens)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    system_prompt: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Token ids of a conversation that the assistant is to continue, and may call `tools` for. Raises `ConfigError` for
    tools that the chat template has no place for."""
    if tools and "tools" not in str(tokenizer.get_chat_template(tools=list(tools))):
        raise ConfigError(
            f"The chat template of {tokenizer.name_or_path} has no place for tools, which the task offers; train a "
            "model whose template presents them."
        )
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    ids = tokenizer.apply_chat_template(
        [*system, *messages],
        tools=list(tools) or None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return list(ids)


def render_reply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of what follows the token that ends an assistant's turn, where `messages` answer it and the assistant
    is to go on.

    They are what the chat template adds to a conversation, so that nothing that was said is encoded again. Raises
    `ConfigError` for a template that changes earlier turns when later ones come.
    """
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = tokenizer.apply_chat_template(said, tokenize=False)
    after = tokenizer.apply_chat_template([*said, *messages], add_generation_prompt=True, tokenize=False)
    if not after.startswith(before):
        raise ConfigError(
            f"The chat template of {tokenizer.name_or_path} changes earlier turns when later ones come, so that its "
            "model cannot take turns with an environment; give the tokenizer a template that only appends."
        )
    _, end, rest = before.rpartition(tokenizer.eos_token)
    added = (rest if end else "") + after[len(before) :]
    return list(tokenizer(added, add_special_tokens=False).input_ids)


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name.

    One that is all in its tokenizer.json is read without `AutoTokenizer`, whose import brings torch along: reward
    models and drivers start seconds sooner.
    """
    config = Path(model, "tokenizer_config.json")
    whole = config.is_file() and Path(model, "tokenizer.json").is_file()
    if whole and json.loads(config.read_text()).get("tokenizer_class") in _PLAIN_CLASSES:
        return PreTrainedTokenizerFast.from_pretrained(model)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def same_tokens(model: str | Path, other: str | Path) -> bool:
    """Whether the tokenizers of two models mean the same by each token id, however their files are written. Raises
    `DataError` where a directory holds no tokenizer that can be read."""
    vocabularies = []
    for place in (model, other):
        try:
            vocabularies.append(load_tokenizer(place).get_vocab())
        except (OSError, ValueError) as error:
            raise DataError(f"{place} has no readable tokenizer; save one there with save_pretrained.") from error
    return vocabularies[0] == vocabularies[1]
