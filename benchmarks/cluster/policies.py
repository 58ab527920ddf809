"""How others place requests."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks.cluster.simulation import Policy
from thornback.algorithms import Node, Placement, PlacementConfig, Placer, Role

STATIC, LEAST, COLOCATED, CONDITIONAL, OURS = (
    "static round-robin",
    "static least-loaded",
    "colocated",
    "conditional split",
    "thornback",
)


class _Counting:
    """Knows what it has placed."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = {node.node_id: node for node in nodes}
        self._prefills = [node.node_id for node in nodes if node.role is Role.PREFILL]
        self._decodes = [node.node_id for node in nodes if node.role is Role.DECODE]
        self._prompt_tokens: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()

    def _placed(self, prefill: str, decode: str, num_tokens: int) -> Placement:
        self._prompt_tokens[prefill] += num_tokens
        self._answers[decode] += 1
        same = self._nodes[prefill].machine == self._nodes[decode].machine
        return Placement(prefill, decode, num_tokens, 0, same)

    def prefilled(self, placed: Placement) -> None:
        self._prompt_tokens[placed.prefill] -= placed.num_tokens

    def begun(self, placed: Placement, now: float) -> None: ...

    def said(self, placed: Placement, num_tokens: int) -> None: ...

    def finished(self, placed: Placement, num_outputs: int) -> None:
        self._answers[placed.decode] -= 1


class RoundRobin(_Counting):
    """Two fixed pools, each in turn: vLLM's proxy, Ray Serve LLM."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__(nodes)
        self._turns = itertools.cycle(self._prefills), itertools.cycle(self._decodes)

    def place(self, now: float, num_tokens: int) -> Placement:
        return self._placed(next(self._turns[0]), next(self._turns[1]), num_tokens)


class LeastLoaded(_Counting):
    """Two fixed pools: the fewest prompt tokens, the fewest answers."""

    def place(self, now: float, num_tokens: int) -> Placement:
        prefill = min(self._prefills, key=self._prompt_tokens.__getitem__)
        return self._placed(prefill, min(self._decodes, key=self._answers.__getitem__), num_tokens)


class Colocated(_Counting):
    """Every replica does both, prompts in chunks: plain vLLM behind a router that counts requests."""

    def place(self, now: float, num_tokens: int) -> Placement:
        node = min(self._nodes, key=lambda n: (self._answers[n], self._prompt_tokens[n]))
        return self._placed(node, node, num_tokens)


class ConditionalSplit(LeastLoaded):
    """The same pools, but prompts of fewer than `SHORT` tokens stay where they are decoded: Dynamo's."""

    SHORT = 1000

    def place(self, now: float, num_tokens: int) -> Placement:
        if num_tokens >= self.SHORT:
            return super().place(now, num_tokens)
        decode = min(self._decodes, key=self._answers.__getitem__)
        return self._placed(decode, decode, num_tokens)


def make(name: str, nodes: Sequence[Node], config: PlacementConfig) -> Policy:
    others: dict[str, Callable[[Sequence[Node]], Policy]] = {
        STATIC: RoundRobin,
        LEAST: LeastLoaded,
        COLOCATED: Colocated,
        CONDITIONAL: ConditionalSplit,
    }
    if name != OURS:
        return others[name](nodes)
    placer = Placer(config)
    for node in nodes:
        placer.add(node)
    return placer
