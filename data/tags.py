"""The tags that a model is asked to answer in: `<think>reasoning</think><answer>answer</answer>`."""

from __future__ import annotations

import re

THINK = "think"
ANSWER = "answer"


def tagged(text: str, tag: str = ANSWER) -> str | None:
    """What stands in the last pair of `tag`, stripped; None if there is no pair."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else None


def is_well_formed(text: str, think: str = THINK, answer: str = ANSWER) -> bool:
    """Whether `text` is reasoning and answer, each in its tags, exactly once, in this order, neither empty, and with
    nothing but white space around them."""
    if any(text.count(t) != 1 for name in (think, answer) for t in (f"<{name}>", f"</{name}>")):
        return False
    return re.fullmatch(rf"\s*<{think}>.*\S.*</{think}>\s*<{answer}>.*\S.*</{answer}>\s*", text, re.DOTALL) is not None
