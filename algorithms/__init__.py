"""The papers' mathematics as pure functions: state in, state out. Knows no Ray."""

from thornback.algorithms.advantages import ANCHORED, ESTIMATORS, Advantages, GroupRewards
from thornback.algorithms.alignment import align_runs, runs_of
from thornback.algorithms.difficulty import fate
from thornback.algorithms.segments import SegmentAllocator

# The losses are torch functions: `from thornback.algorithms.losses import policy_loss` keeps torch out of here.
__all__ = [
    "ANCHORED",
    "ESTIMATORS",
    "Advantages",
    "GroupRewards",
    "SegmentAllocator",
    "align_runs",
    "fate",
    "runs_of",
]
