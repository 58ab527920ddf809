"""Where requests are prefilled and decoded, and which replicas do what (FlowKV, papers.md section 4).

Every replica can do both; a role is a preference. What is known of N replicas is a table of float64, a row each; a
decision is one pass over it. Pure: `now` is an argument, and nothing here waits or asks.
"""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from thornback.algorithms.compiled import compiled


class Role(Enum):
    PREFILL = 0
    DECODE = 1


class State(Enum):
    """The paper's, of all replicas together."""

    NORMAL = "normal"
    IMBALANCE = "imbalance"
    EXTREME_HIGH = "extreme high"
    EXTREME_LOW = "extreme low"


@dataclass(frozen=True, slots=True)
class Node:
    """A replica. `machine`: replicas of one hand over by shared memory. Its speed: prompt tokens a second; seconds of
    a step that decodes, and what each sample and each token of context adds to that. `capacity`: tokens of its pool.
    `max_num_seqs`: samples of a step."""

    node_id: str
    machine: str = ""
    role: Role = Role.DECODE
    prefill_rate: float = 10_000.0
    step_seconds: float = 0.01
    sample_seconds: float = 0.0
    context_seconds: float = 0.0
    capacity: int = 1 << 20
    max_num_seqs: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """Ours: the paper gives no weights. `split_tokens`: prompts that leave fewer tokens to compute stay where they are
    decoded. `transfer_seconds`, `transfer_rate`: of a hand-over to another machine, and its tokens a second; within one
    it is taken to be free. `first_token_seconds`, `token_seconds`: objectives, by which load is measured.
    `num_output_tokens`: of an answer, before any has been seen.

    A pool is busy above `high` and idle below `low`, smoothed over `smoothing` windows of `window` seconds. In
    imbalance a replica of the idle pool takes the other role for `role_windows`. Both busy, or both idle, for
    `extreme_windows` is extreme. `target`: the load that a pool is to have, by which replicas are asked for.

    `memory`: seconds over which it is seen how much of its time a replica spends on prompts, which it computes in
    chunks of `max_num_batched_tokens`. `refuses`: whether requests are that would come too late."""

    split_tokens: int = 64
    transfer_seconds: float = 0.002
    transfer_rate: float = 150_000.0
    first_token_seconds: float = 2.0
    token_seconds: float = 0.1
    num_output_tokens: float = 128.0
    high: float = 0.7
    low: float = 0.35
    window: float = 0.5
    smoothing: float = 2.0
    role_windows: int = 8
    extreme_windows: int = 4
    target: float = 0.5
    memory: float = 10.0
    refuses: bool = False
    max_num_batched_tokens: int = 2048


@dataclass(slots=True, eq=False)
class Placement:
    """Where a prompt of `num_tokens` goes, of which `num_hit` are cached there; the same replica twice: it stays.
    `time`: when that was decided; `begins`: when its answer is expected to, or did; `num_said`: tokens of that."""

    prefill: str
    decode: str
    num_tokens: int
    num_hit: int
    same_machine: bool
    time: float = 0.0
    begins: float = 0.0
    num_said: int = 0

    @property
    def split(self) -> bool:
        return self.prefill != self.decode


_PREFERENCE = 0.2  # of a sample that would be delayed, and of a step: what it costs to leave one's role
_COVERED, _RECENT = 0.95, 32  # the share of first tokens, of so many, that are to be no later than expected
_SHORT = 0.25  # of the objective: what is small beside it is as good as expected, however many times it is
_NEW_OUTPUTS = 0.02  # what an answer's length weighs beside those before it, at least
_LATE = 2.0  # times the objective: what a first token costs that comes too late, beside its wait

# Columns of the table.
_QUEUED, _RUNNING, _CONTEXT, _ACTING, _WORK, _RATE, _STEP, _SAMPLE, _PER_TOKEN, _CAPACITY, _SEQS, _MACHINE = range(12)
_NEXT, _LEFT = 12, 13  # when the answer began whose place in the batch comes free for the next one; its share to come
_WIDTH = _LEFT + 1


class Placer:
    """What is known of the replicas, by what was placed and has not ended; and what follows from it."""

    def __init__(self, config: PlacementConfig) -> None:
        self.config = config
        self.state = State.NORMAL
        self._nodes: list[Node] = []
        self._row: dict[str, int] = {}
        self._machines: dict[str, int] = {}
        self._table = np.zeros((0, _WIDTH))
        self._answers: dict[str, list[Placement]] = {}  # those that each replica gives, in the order of their beginning
        self._next: dict[str, Placement | None] = {}  # whose place in the batch the next one takes, where it is full
        self._switched: dict[str, int] = {}  # for how many windows more a replica has the other role
        self._load = np.zeros(2)  # of the pools, smoothed
        self._window_end = self._now = float("-inf")
        self._extreme = 0
        self._outputs, self._num_finished = config.num_output_tokens, 0
        self._waits: deque[float] = deque(maxlen=_RECENT)  # for first tokens, over those expected, `_SHORT` added
        self._longer, self._told = 0.0, float("-inf")  # nearly all are at most so; when the last was seen

    def warm_up(self) -> None:
        """Have what is compiled at its first use compiled before anybody waits for it."""
        other = Placer(self.config)
        other.add(Node(""))
        other.place(0.0, 1)

    def add(self, node: Node) -> None:
        """A replica is there, or its speed is known better."""
        if node.node_id not in self._row:
            self._row[node.node_id] = len(self._nodes)
            self._nodes.append(node)
            self._table = np.concatenate([self._table, np.zeros((1, _WIDTH))])
            self._table[-1, _NEXT] = np.nan
            self._answers[node.node_id], self._next[node.node_id] = [], None
        row = self._row[node.node_id]
        self._nodes[row] = node
        machine = self._machines.setdefault(node.machine, len(self._machines))  # never more than there were replicas
        self._table[row, _RATE:_NEXT] = (
            node.prefill_rate,
            node.step_seconds,
            node.sample_seconds,
            node.context_seconds,
            node.capacity,
            node.max_num_seqs,
            machine,
        )
        self._table[row, _ACTING] = self.acting(node.node_id).value

    def remove(self, node_id: str) -> None:
        """A replica is gone, and what was placed there with it."""
        row = self._row.pop(node_id)
        del self._nodes[row]
        self._table = np.delete(self._table, row, 0)
        self._row = {node.node_id: i for i, node in enumerate(self._nodes)}
        self._switched.pop(node_id, None)
        del self._answers[node_id], self._next[node_id]

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._row

    def acting(self, node_id: str) -> Role:
        """The role that a replica has now."""
        home = self._nodes[self._row[node_id]].role
        return Role(1 - home.value) if node_id in self._switched else home

    def queued(self, node_id: str) -> float:
        """Tokens of prompts that wait, or are computed, at a replica."""
        return float(self._table[self._row[node_id], _QUEUED]) if node_id in self._row else 0.0

    def place(
        self,
        now: float,
        num_tokens: int,
        hits: Mapping[str, int] | None = None,
        whole: bool = False,
        first_token_seconds: float | None = None,
    ) -> Placement | None:
        """The cheapest places for a prompt of so many tokens, of which `hits` says how many are cached where; one place
        where it must stay `whole`. Cost is the time that passes for all: for the request itself, and for those that it
        delays. None: nobody would give its first token in time, mostly for others' sake, in extreme load or where all
        batches are full, and it is better refused at once (one that takes so long by itself is not).
        Where it says itself what is in time for it, `first_token_seconds`, it is refused whenever that is not kept."""
        if not self._nodes:
            return None
        self.look(now)
        self._table[:, _WORK] *= np.exp(min(0.0, self._now - now) / self.config.memory)
        self._now = now
        cached = np.zeros(len(self._nodes))
        for node_id, count in (hits or {}).items():
            if node_id in self._row:
                cached[self._row[node_id]] = min(count, num_tokens - 1)
        prefill, decode, wait, full = _cheapest(
            self._table,
            cached,
            float(num_tokens),
            self._outputs,
            np.inf if whole else float(self.config.split_tokens),
            (self.config.transfer_seconds, self.config.transfer_rate),
            self.config.first_token_seconds,
            (self.config.memory, float(self.config.max_num_batched_tokens)),
            now,
        )
        if now - self._told > self.config.memory:
            self._waits.clear()
            self._longer = 0.0
        covered = max(wait, self._longer * (wait + self._short))
        if first_token_seconds is not None:
            refused = covered > first_token_seconds
        else:
            late = covered > self.config.first_token_seconds
            late &= wait > 2 * (num_tokens - cached[prefill]) / self._table[prefill, _RATE]
            refused = self.config.refuses and late and (full or self.state is State.EXTREME_HIGH)
        if refused:
            return None
        nodes, machines = self._nodes, self._table[:, _MACHINE]
        placed = Placement(
            nodes[prefill].node_id,
            nodes[decode].node_id,
            num_tokens,
            int(cached[prefill]),
            bool(machines[prefill] == machines[decode]),
            now,
            now + wait,
        )
        self._table[prefill, _QUEUED] += num_tokens - placed.num_hit
        self._table[prefill, _WORK] += (num_tokens - placed.num_hit) / self._table[prefill, _RATE]
        self._table[decode, _RUNNING] += 1
        self._table[decode, _CONTEXT] += num_tokens
        insort(self._answers[placed.decode], placed, key=_begins)
        self._find_next(placed.decode)
        return placed

    def prefilled(self, placed: Placement) -> None:
        """The first token is there."""
        if placed.prefill in self._row:
            row = self._table[self._row[placed.prefill]]
            row[_QUEUED] = max(0.0, row[_QUEUED] - (placed.num_tokens - placed.num_hit))

    def begun(self, placed: Placement, now: float) -> None:
        """It has a place in the batch where it is decoded: its first token came from there."""
        if not self._forget(placed):
            return
        self._waits.append((now - placed.time) / (placed.begins - placed.time + self._short))
        self._told = now
        if len(self._waits) >= _RECENT // 4:
            self._longer = sorted(self._waits)[int(_COVERED * len(self._waits))]
        placed.begins = now
        insort(self._answers[placed.decode], placed, key=_begins)
        self._find_next(placed.decode)

    def said(self, placed: Placement, num_tokens: int) -> None:
        """So many more tokens of its answer have come."""
        placed.num_said += num_tokens
        if self._next.get(placed.decode) is placed:
            self._table[self._row[placed.decode], _LEFT] = self._left(placed)

    def finished(self, placed: Placement, num_outputs: int) -> None:
        """The answer has ended, after so many tokens."""
        self._num_finished += 1
        self._outputs += max(_NEW_OUTPUTS, 1 / (1 + self._num_finished)) * (num_outputs - self._outputs)
        if placed.decode in self._row:
            row = self._table[self._row[placed.decode]]
            row[_RUNNING] = max(0.0, row[_RUNNING] - 1)
            row[_CONTEXT] = max(0.0, row[_CONTEXT] - placed.num_tokens)
            if self._forget(placed):
                self._find_next(placed.decode)

    def _forget(self, placed: Placement) -> bool:
        """False: it has ended, or that was before the replica went, if it came back."""
        answers = self._answers.get(placed.decode, [])
        at = bisect_left(answers, placed.begins, key=_begins)
        while at < len(answers) and answers[at] is not placed:  # others may have begun at the same time
            at += 1
        found = at < len(answers)
        if found:
            del answers[at]
        return found

    def _find_next(self, node_id: str) -> None:
        node, answers = self._nodes[self._row[node_id]], self._answers[node_id]
        free = node.max_num_seqs - len(answers)
        found = self._next[node_id] = None if free > 0 else answers[-free]
        row = self._table[self._row[node_id]]
        row[_NEXT], row[_LEFT] = (np.nan, 1.0) if found is None else (found.begins, self._left(found))

    def _left(self, placed: Placement) -> float:
        """The share of its answer that is still to come; 1: nothing of it was seen."""
        return max(0.0, 1.0 - placed.num_said / self._outputs)

    @property
    def _short(self) -> float:
        return _SHORT * self.config.first_token_seconds

    # States

    def loads(self) -> tuple[float, float]:
        """S_P and S_D: how busy the two pools are now. 1: at their objectives, or full. Who decodes and has no one to
        prefill for it is as busy with the one as with the other."""
        table, config = self._table, self.config
        waits = table[:, _QUEUED] / table[:, _RATE] / config.first_token_seconds
        steps = table[:, _STEP] + table[:, _RUNNING] * table[:, _SAMPLE] + table[:, _CONTEXT] * table[:, _PER_TOKEN]
        steps *= table[:, _RUNNING] > 0  # an idle replica makes none
        use = (table[:, _CONTEXT] + table[:, _RUNNING] * self._outputs / 2) / table[:, _CAPACITY]
        busy = np.maximum(np.maximum(steps / config.token_seconds, use), table[:, _RUNNING] / table[:, _SEQS])
        decodes = table[:, _ACTING] == Role.DECODE.value
        if decodes.all():
            busy = np.maximum(busy, waits)
        means = [float(x.mean()) if len(x) else 0.0 for x in (waits[~decodes], busy[decodes])]
        return means[0], means[1]

    def demand(self) -> dict[Role, float]:
        """How many replicas the work of this placer would keep as busy as `target`, of each role. A pool that others
        help, which have the time, asks for no more."""
        homes = np.array([sum(node.role is role for node in self._nodes) for role in Role])
        acting = np.array([sum(self.acting(node.node_id) is role for node in self._nodes) for role in Role])
        wanted = acting * self._load / self.config.target
        for role in Role:
            own, other = role.value, 1 - role.value
            lacking = wanted[own] - homes[own]
            if 0 < lacking <= homes[other] - wanted[other] and homes[other] > 1:
                wanted[own] = homes[own]
        return {role: float(wanted[role.value]) for role in Role}

    def look(self, now: float) -> None:
        """Look at the pools, once a window at most; `place` does so itself."""
        if now < self._window_end:
            return
        self._window_end = now + self.config.window
        self._load += (np.array(self.loads()) - self._load) / self.config.smoothing
        for node_id in [n for n, left in self._switched.items() if left <= 1]:
            self._switch_back(node_id)
        for node_id in self._switched:
            self._switched[node_id] -= 1
        self.state = self._judge()

    def _judge(self) -> State:
        busy, idle = self._load > self.config.high, self._load < self.config.low
        there = [any(node.role is role for node in self._nodes) for role in Role]
        extreme = 1 if busy[there].all() else -1 if idle[there].all() else 0
        self._extreme = self._extreme + extreme if extreme * self._extreme >= 0 and extreme else extreme
        if abs(self._extreme) >= self.config.extreme_windows:
            return State.EXTREME_HIGH if extreme > 0 else State.EXTREME_LOW
        for pool in Role:
            if busy[pool.value] and idle[1 - pool.value]:
                self._help(pool)
                return State.IMBALANCE
        return State.NORMAL

    def _help(self, pool: Role) -> None:
        """The least loaded replica of the other pool takes this role for a while, unless it is the last one; one that
        is lent the other way comes home first."""
        others = [n.node_id for n in self._nodes if self.acting(n.node_id) is not pool]
        if len(others) <= 1:
            return
        lent = [node_id for node_id in others if node_id in self._switched]
        if lent:
            self._switch_back(lent[0])
            return
        column = _QUEUED if pool is Role.DECODE else _RUNNING
        least = min(others, key=lambda node_id: self._table[self._row[node_id], column])
        self._switched[least] = self.config.role_windows
        self._table[self._row[least], _ACTING] = pool.value

    def _switch_back(self, node_id: str) -> None:
        del self._switched[node_id]
        self._table[self._row[node_id], _ACTING] = self._nodes[self._row[node_id]].role.value


def _begins(placed: Placement) -> float:
    return placed.begins


@compiled
def _cheapest(table, cached, num_tokens, outputs, split_tokens, transfer, in_time, chunks, now):
    """The rows of the cheapest places, how long the first token takes there, and whether the batch there is full.

    Prefilling costs what the request waits, and what it delays the samples that the replica decodes meanwhile; decoding
    costs its steps, and what the request adds to those of the others. Nobody decodes who has no room. A role is a
    preference: to do what the other one does costs a little more."""
    size, (memory, chunk) = len(table), chunks
    prefill_cost, decode_cost, waits, slots = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    for n in range(size):
        node, decodes = table[n], table[n, _ACTING] == 1.0
        own = (num_tokens - cached[n]) / node[_RATE]
        step = node[_STEP] + node[_RUNNING] * node[_SAMPLE] + node[_CONTEXT] * node[_PER_TOKEN]
        added = node[_SAMPLE] + (num_tokens + outputs / 2) * node[_PER_TOKEN]
        # A share of the time goes into chunks of prompts, each a step that is so much longer.
        share, longer = min(0.95, node[_WORK] / memory), step + added
        steps = outputs / (share / (chunk / node[_RATE] + longer) + (1.0 - share) / longer)
        # Who finds the batch full, with a prompt or an answer, waits until as many have ended as are too many: no less
        # than if they ended evenly, and if they began together, until those end. NaN: it is not full.
        slots[n] = max(0.0, node[_RUNNING] + 1.0 - node[_SEQS]) * steps / node[_SEQS]
        if not np.isnan(node[_NEXT]):
            left = node[_LEFT] * steps if node[_LEFT] < 1.0 else node[_NEXT] + steps - now
            slots[n] = max(slots[n], left)
        # A replica that decodes gives a part of every step to that.
        waits[n] = node[_QUEUED] / node[_RATE] + slots[n] + own + (step if node[_RUNNING] else 0.0)
        prefill_cost[n] = waits[n] + max(node[_RUNNING], _PREFERENCE if decodes else 0.0) * own
        if waits[n] > in_time:
            prefill_cost[n] += _LATE * in_time
        decode_cost[n] = steps + slots[n] + outputs * added * node[_RUNNING] + node[_QUEUED] / node[_RATE]
        if not decodes:
            decode_cost[n] += _PREFERENCE * node[_STEP] * outputs
        if node[_CONTEXT] + num_tokens + outputs + node[_RUNNING] * outputs / 2 > node[_CAPACITY]:
            decode_cost[n] += 1e3 * (node[_CONTEXT] + num_tokens) / node[_CAPACITY]
    together = prefill_cost + decode_cost - slots  # who stays has waited for the batch once
    best = int(np.argmin(together))
    if num_tokens - cached[best] < split_tokens:
        return best, best, waits[best], slots[best] > 0.0
    # Else from any to the cheapest that decodes: of all, or on its machine, where the way is free.
    cost, prefill, decode = together[best], best, best
    way, anywhere = transfer[0] + num_tokens / transfer[1], int(np.argmin(decode_cost))
    near = np.full(int(table[:, _MACHINE].max()) + 1, -1)
    for d in range(size):
        machine = int(table[d, _MACHINE])
        if near[machine] < 0 or decode_cost[d] < decode_cost[near[machine]]:
            near[machine] = d
    for p in range(size):
        home = near[int(table[p, _MACHINE])]
        if prefill_cost[p] + decode_cost[home] < cost:
            cost, prefill, decode = prefill_cost[p] + decode_cost[home], p, home
        if prefill_cost[p] + way + decode_cost[anywhere] < cost:
            cost, prefill, decode = prefill_cost[p] + way + decode_cost[anywhere], p, anywhere
    after = slots[decode] if prefill != decode else 0.0
    return prefill, decode, waits[prefill] + after, slots[prefill] + after > 0.0
