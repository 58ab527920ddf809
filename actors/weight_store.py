"""The weight store: one buffer a version in the object store, mapped by every worker of a node."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from thornback.actors.supervision import Home, LearnerLost, is_lost


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A version's buffer (uint8 `[bytes]`) and its index, both in the object store.

    Pass the references themselves to an actor's method: it then gets the mapped buffer, not a copy.
    """

    version: int
    buffer: ObjectRef
    index: ObjectRef


class WeightStoreCore:
    """Keeps the newest `keep` versions. What a reader has mapped stays mapped until it lets go of it.

    The store calls the learner and thereby owns what the learner returns: published weights outlive a learner's
    death, and anyone who holds the store's handle can ask for the latest.
    """

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._versions: dict[int, PublishedWeights] = {}

    def setup(self) -> Home:
        return Home.here()

    def publish(self, ranks: list[ActorHandle], version: int, timeout: float) -> PublishedWeights:
        """Take the weights of a learner group as `version`; raises `LearnerLost` if a rank is gone or does not
        answer within `timeout` seconds.

        Every rank takes part, since shards are gathered; the first returns the weights. The buffer is not fetched
        here, where nobody reads it.
        """
        returns = [rank.weights.remote() for rank in ranks]
        try:
            ray.get([index for _, index in returns], timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            raise LearnerLost(f"the learner did not hand out its weights within {timeout:.0f} s") from None
        except Exception as error:
            if is_lost(error):
                raise LearnerLost("a learner rank died while publishing its weights") from None
            raise
        published = PublishedWeights(version, *returns[0])
        # Versions above it are of steps that a run has gone back behind.
        self._versions = {v: weights for v, weights in self._versions.items() if v < version} | {version: published}
        for old in sorted(self._versions)[: -self._keep]:
            del self._versions[old]
        return published

    def latest(self) -> PublishedWeights | None:
        """The newest version, or None before the first."""
        return self._versions[max(self._versions)] if self._versions else None


WeightStore = ray.remote(WeightStoreCore)
