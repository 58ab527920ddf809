"""The papers' mathematics as pure functions: state in, state out."""

from thornback.algorithms.alignment import align_runs, runs_of
from thornback.algorithms.segments import SegmentAllocator

__all__ = ["SegmentAllocator", "align_runs", "runs_of"]
