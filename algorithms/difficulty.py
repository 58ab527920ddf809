"""What pre-sampling does with a prompt, by how often the reference policy is right (PVPO, papers.md section 2)."""

from __future__ import annotations

from typing import Literal

Fate = Literal["keep", "drop", "ask"]


def fate(accuracy: float, drop_solved: bool = True, drop_unsolved: bool = True) -> Fate:
    """ "drop": always right, nothing left to learn; "ask": never right, so a larger model is asked for a right
    answer and the prompt is dropped where it has none; "keep": everything between. `accuracy` in [0, 1]."""
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy is {accuracy}, but must be in [0, 1].")
    if accuracy == 1.0 and drop_solved:
        return "drop"
    return "ask" if accuracy == 0.0 and drop_unsolved else "keep"
