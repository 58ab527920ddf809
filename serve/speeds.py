"""How fast replicas turn out to be, by the answers that they give and by what they report."""

from __future__ import annotations

import time
from dataclasses import replace

from thornback.algorithms import Node, Placement, Placer

NEW = 0.1  # what a measured speed weighs beside those before it
PER_SAMPLE = 0.02  # of a step: what each sample adds to it
LEAST_TOKENS = 256  # of a prompt by which a replica's speed is seen: shorter ones take what calls take


class Speeds:
    """Tells a `Placer` of replicas, and of how its placements went."""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer
        self._nodes: dict[str, Node] = {}

    def add(self, node: Node) -> None:
        """A replica is there; one that was there before has the speed that it had."""
        node = self._nodes.setdefault(node.node_id, node)
        self._placer.add(node)

    def remove(self, node_id: str) -> None:
        """It takes no more; `add` may bring it back."""
        if node_id in self._placer:
            self._placer.remove(node_id)

    def forget(self, node_id: str) -> None:
        """It is gone for good."""
        self.remove(node_id)
        self._nodes.pop(node_id, None)

    def clock(self, placed: Placement) -> Clock:
        """Starts with a placement; `close` it however that ends."""
        return Clock(self, self._placer, placed)

    def prefilled(self, node_id: str, num_tokens: int, seconds: float) -> None:
        """A prompt's tokens were computed in so many seconds."""
        node = self._nodes.get(node_id)
        if node is not None and num_tokens >= LEAST_TOKENS:
            rate = num_tokens / seconds
            self._measured(replace(node, prefill_rate=node.prefill_rate + NEW * (rate - node.prefill_rate)))

    def stepped(self, node_id: str, step_seconds: float, num_running: int) -> None:
        """The tokens of a sample lay so far apart of late, beside others."""
        node = self._nodes.get(node_id)
        if node is not None and step_seconds:
            step = step_seconds / (1 + PER_SAMPLE * num_running)
            self._measured(replace(node, step_seconds=step, sample_seconds=PER_SAMPLE * step))

    def _measured(self, node: Node) -> None:
        self._nodes[node.node_id] = node
        if node.node_id in self._placer:
            self._placer.add(node)


class Clock:
    """When the tokens of one placement came."""

    def __init__(self, speeds: Speeds, placer: Placer, placed: Placement) -> None:
        self._speeds, self._placer, self._placed = speeds, placer, placed
        self._own = placed.num_tokens - placed.num_hit
        self._alone = placer.queued(placed.prefill) <= self._own  # no other prompt is before this one
        self._began = time.monotonic()
        self._begun = False  # where it is decoded

    def tokens(self, count: int) -> None:
        """So many have come, of all samples."""
        now = time.monotonic()
        if not self._placed.num_said:
            self._placer.prefilled(self._placed)
            if self._alone and count == 1:
                self._speeds.prefilled(self._placed.prefill, self._own, max(now - self._began, 1e-6))
        if not self._begun and (self._placed.num_said or not self._placed.split):
            self._begun = True
            self._placer.begun(self._placed, now)
        self._placer.said(self._placed, count)

    def close(self) -> None:
        if not self._placed.num_said:
            self._placer.prefilled(self._placed)
        self._placer.finished(self._placed, self._placed.num_said)
