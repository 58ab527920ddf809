"""The papers' mathematics as pure functions: state in, state out. Knows no Ray."""

from thornback.algorithms.advantages import ANCHORED, ESTIMATORS, Advantages, GroupRewards
from thornback.algorithms.alignment import align_runs, runs_of
from thornback.algorithms.difficulty import fate
from thornback.algorithms.forests import (
    are_trees,
    chains,
    choose,
    fuse_all,
    join,
    learn_all,
    promise_of,
    sizes_of,
    verify_all,
)
from thornback.algorithms.growth import Growth, Level
from thornback.algorithms.placement import Node, Placement, PlacementConfig, Placer, Role, State
from thornback.algorithms.prefixes import PrefixIndex
from thornback.algorithms.segments import SegmentAllocator
from thornback.algorithms.speculation import FORGETTING, best_size, record_size, rests
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
    "FORGETTING",
    "Advantages",
    "GroupRewards",
    "Growth",
    "Level",
    "Node",
    "Placement",
    "PlacementConfig",
    "Placer",
    "PrefixIndex",
    "Role",
    "SegmentAllocator",
    "State",
    "agreement",
    "align_runs",
    "ancestor_bits",
    "are_trees",
    "best_size",
    "chains",
    "choose",
    "depths",
    "fate",
    "fuse",
    "fuse_all",
    "is_tree",
    "join",
    "learn_all",
    "likelihoods",
    "promise_of",
    "record_size",
    "rests",
    "runs_of",
    "sizes_of",
    "verify",
    "verify_all",
]
