"""The papers' mathematics as pure functions: state in, state out. Knows no Ray."""

from thornback.algorithms.advantages import ANCHORED, ESTIMATORS, Advantages, GroupRewards
from thornback.algorithms.alignment import align_runs, runs_of
from thornback.algorithms.difficulty import fate
from thornback.algorithms.forests import agree_all, choose, fuse_all, verify_all
from thornback.algorithms.growth import Growth, Level
from thornback.algorithms.segments import SegmentAllocator
from thornback.algorithms.speculation import Agreement, Belief, best_size
from thornback.algorithms.trees import (
    agreement,
    ancestor_bits,
    depths,
    fuse,
    is_tree,
    likelihoods,
    verify,
)

# The losses are torch functions: `from thornback.algorithms.losses import policy_loss` keeps torch out of here.
__all__ = [
    "ANCHORED",
    "ESTIMATORS",
    "Advantages",
    "Agreement",
    "Belief",
    "GroupRewards",
    "Growth",
    "Level",
    "SegmentAllocator",
    "agree_all",
    "agreement",
    "align_runs",
    "ancestor_bits",
    "best_size",
    "choose",
    "depths",
    "fate",
    "fuse",
    "fuse_all",
    "is_tree",
    "likelihoods",
    "runs_of",
    "verify",
    "verify_all",
]
