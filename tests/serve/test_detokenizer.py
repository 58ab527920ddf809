"""Text comes out as it is complete, and the pieces are the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from thornback.serve.detokenizer import REPLACEMENT, Detokenizer
from thornback.serve.stop_strings import StopStrings


def byte_tokenizer() -> Tokenizer:
    """One token a byte, as byte-level BPE without merges: every character beyond ASCII is split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def piece_tokenizer() -> Tokenizer:
    """Sentencepiece's way: words with a mark for their space (dropped at the beginning), other bytes as tokens."""
    words = ["<unk>", "▁a", "▁the", "b", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_tokens(character: str) -> list[int]:
    """A character as `piece_tokenizer`'s byte tokens."""
    return [5 + byte for byte in character.encode()]


TOKENIZERS = {"bytes": byte_tokenizer(), "pieces": piece_tokenizer()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_pieces_joined_are_the_whole(kind, data):
    tokenizer = TOKENIZERS[kind]
    if kind == "bytes":
        tokens = data.draw(st.lists(st.integers(0, 255), max_size=40))
    else:  # whose decoder gives up a whole run of bytes for one wrong byte in it: these are right
        part = st.integers(1, 4).map(lambda i: [i]) | st.sampled_from("é€漢😀").map(byte_tokens)
        tokens = [token for tokens in data.draw(st.lists(part, max_size=20)) for token in tokens]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=10)))
    stream = Detokenizer(tokenizer.decode)
    groups = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    pieces = [stream.push(group) for group in groups]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(tokens)


@settings(deadline=None)
@given(st.text(alphabet="aé€😀 ", max_size=20))
def test_no_replacement_character_while_a_character_is_unfinished(text):
    tokenizer = TOKENIZERS["bytes"]
    stream = Detokenizer(tokenizer.decode)
    shown = ""
    for token in tokenizer.encode(text).ids:
        shown += stream.push([token])
        assert REPLACEMENT not in shown
        assert text.startswith(shown)
    assert shown == text


def test_bytes_that_stay_unfinished_show_at_the_end():
    tokenizer = TOKENIZERS["bytes"]
    stream = Detokenizer(tokenizer.decode)
    tokens = tokenizer.encode("a€").ids[:-1]
    assert "".join(stream.push([t]) for t in tokens) == "a"
    assert stream.flush() == REPLACEMENT


def test_tokens_that_show_nothing_are_not_gathered_for_ever():
    lengths = []

    def decode(tokens):
        lengths.append(len(tokens))
        return "".join("" if token == 0 else "x" for token in tokens)

    stream = Detokenizer(decode)
    shown = stream.push([1]) + "".join(stream.push([0]) for _ in range(1000)) + stream.push([1])
    assert shown == "xx"
    assert max(lengths) < 100


@settings(deadline=None)
@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_stop_strings_across_borders(text, stops, size):
    stream = StopStrings(stops)
    shown = ""
    for start in range(0, len(text), size):
        shown += stream.push(text[start : start + size])
        assert not any(stop in shown for stop in stops)
        if stream.found:
            break
    else:
        shown += stream.flush()
    if stream.found:
        end = text.index(stream.found)
        assert shown == text[:end]
    else:
        assert shown == text
        assert not any(stop in text for stop in stops)
