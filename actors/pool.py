"""A pool of equal actors. Work that is lost with an actor is issued again, whole, to the one that replaces it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from thornback.actors.supervision import DataLost, Home, Restarts, is_lost, kill, original_error
from thornback.contracts import ActorLost

LOST_CALL = object()
MAX_LOSSES = 2  # work that was lost more often than this takes its actors down by itself


@dataclass(slots=True)
class _Slot:
    """A place in the pool, and the actor that fills it now."""

    number: int
    actor: ActorHandle
    setup: ObjectRef
    home: Home | None = None  # None: it is not ready
    lost_at: float | None = None  # when the actor before it was


@dataclass(slots=True, eq=False)
class Flight:
    """One piece of work, and how often it was lost. `refs` are its returns while it runs, `deadline` its end."""

    index: int
    args: tuple
    losses: int = 0
    slot: _Slot | None = None
    actor: ActorHandle | None = None  # that got it; the slot may have another one since
    refs: list[ObjectRef] = field(default_factory=list)
    deadline: float = 0.0

    @property
    def number(self) -> int:
        """Of the actor that got it."""
        assert self.slot is not None
        return self.slot.number


class ActorPool:
    """`size` actors of one role, made by `spawn(number)`, each made ready by its method `setup() -> Home`.

    An actor that dies, or does not answer within `timeout` seconds, is replaced; `catch_up(actor)` submits the
    calls that bring a replacement to the others' state (the current weights). An error that an actor raises ends the
    work: it would be raised again. `elastic`: where others are ready, a replacement is not waited for; somebody calls
    `admit` to take it in.
    """

    def __init__(
        self,
        role: str,
        spawn: Callable[[int], ActorHandle],
        size: int,
        *,
        timeout: float,
        restarts: Restarts,
        catch_up: Callable[[ActorHandle], Sequence[ObjectRef]] = lambda actor: (),
        elastic: bool = False,
    ) -> None:
        self.role = role
        self.timeout = timeout
        self._spawn = spawn
        self._restarts = restarts
        self._catch_up = catch_up
        self.elastic = elastic
        self._slots = []
        for number in range(size):
            actor = spawn(number)
            self._slots.append(_Slot(number, actor, actor.setup.remote()))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def actors(self) -> list[ActorHandle]:
        return [slot.actor for slot in self._slots]

    @property
    def homes(self) -> list[Home | None]:
        """Where the actors live, once they are ready."""
        return [slot.home for slot in self._slots]

    def wait_ready(self, at_least: int | None = None) -> None:
        """Wait until so many actors (None: all) are set up, which began with the pool; raises what a set-up raised, or
        `ActorLost`. Others join when `admit` is called."""
        if at_least is None:
            for slot in self._slots:
                if slot.home is None:
                    self._finish_setup(slot)
                    self._restarts.on_event("actor_started", f"{self._name(slot)} is ready")
            return
        deadline = time.monotonic() + self.timeout
        while len(self.ready) < at_least:
            self.admit(seconds=1.0)
            if time.monotonic() > deadline:
                raise ActorLost(
                    f"No {self.role} was ready within {self.timeout:.0f} s (run.timeout_seconds); it may need "
                    "resources that the cluster does not have."
                )

    @property
    def ready(self) -> dict[int, ActorHandle]:
        """The actors that are set up, by number."""
        return {slot.number: slot.actor for slot in self._slots if slot.home is not None}

    def admit(self, seconds: float = 0.0) -> None:
        """Take in the actors that have been set up meanwhile, after at most so many seconds, and bring them to the
        others' state. One that has died is started again."""
        joining = {slot.setup: slot for slot in self._slots if slot.home is None}
        done, _ = ray.wait(list(joining), num_returns=1, timeout=seconds) if joining else ([], [])
        for slot in (joining[ref] for ref in done):
            try:
                self._finish_setup(slot)
                for caught_up in self._catch_up(slot.actor):
                    self._await(slot, caught_up, "catching up")
            except DataLost:
                slot.home = None  # its set-up is done: it is brought up to date once there is something to bring
                raise
            except ActorLost as loss:
                slot.home = None
                self._respawn(slot, str(loss).rstrip("."))
                continue
            if slot.lost_at is None:
                self._restarts.on_event("actor_started", f"{self._name(slot)} is ready")
            else:
                self._tell_restart(slot, slot.lost_at)

    def map(self, method: str, calls: Sequence[tuple], doing: str) -> list[Any]:
        """Call `method(*args)` for each of `calls` on whichever actor is free; results in the order of `calls`.

        Of a method with several returns the last is fetched and the others stay references. `doing` says what
        the work is, for messages.
        """
        todo = deque(Flight(index, tuple(args)) for index, args in enumerate(calls))
        results: list[Any] = [None] * len(todo)
        idle = deque(slot for slot in self._slots if slot.home is not None)
        flying: dict[ObjectRef, Flight] = {}
        while todo or flying:
            if not idle and not flying:
                self.wait_ready(at_least=1)
                idle.extend(slot for slot in self._slots if slot.home is not None)
            while todo and idle:
                call = todo.popleft()
                self._send(call, idle.popleft(), method)
                flying[call.refs[-1]] = call
            done = self._next_done(flying)
            del flying[done.refs[-1]]
            slot = done.slot
            assert slot is not None
            problem = self._collect(done, results)
            if problem is not None:
                done.losses += 1
                self._replace(slot, f"{self._name(slot)} {problem} while {doing}", final=done.losses > MAX_LOSSES)
                todo.appendleft(done)
            if slot.home is not None:
                idle.append(slot)
        return results

    def broadcast(self, method: str, args: tuple, doing: str) -> None:
        """Call `method(*args)` on every actor. One that is lost is replaced, and its replacement caught up:
        `catch_up` must lead to the same state as the call. Those that are not ready are left out."""
        flying = {}
        for slot in (slot for slot in self._slots if slot.home is not None):
            call = Flight(slot.number, args)
            self._send(call, slot, method)
            flying[call.refs[-1]] = call
        results: list[Any] = [None] * len(self._slots)
        while flying:
            done = self._next_done(flying)
            del flying[done.refs[-1]]
            problem = self._collect(done, results)
            if problem is not None and done.slot is not None:
                self._replace(done.slot, f"{self._name(done.slot)} {problem} while {doing}")

    # Calls that are not waited for

    def send(self, number: int, method: str, *args: Any) -> Flight:
        """Call a method of actor `number`, after what it was sent before."""
        flight = Flight(number, args)
        self._send(flight, self._slots[number], method)
        return flight

    def landed(self, flight: Flight, doing: str) -> Any:
        """What a call that has ended, or is past its deadline, has returned; as `map` returns it. `LOST_CALL` where
        its actor is lost: then another one is on its way, which `admit` takes in. Raises what the actor raised."""
        assert flight.slot is not None
        results: list[Any] = [None]
        problem = self._collect(replace(flight, index=0), results)
        if problem is None:
            return results[0]
        if flight.actor is flight.slot.actor:
            self._respawn(flight.slot, f"{self._name(flight.slot)} {problem} while {doing}")
        return LOST_CALL

    def shutdown(self) -> None:
        for slot in self._slots:
            kill(slot.actor)

    def _send(self, call: Flight, slot: _Slot, method: str) -> None:
        refs = getattr(slot.actor, method).remote(*call.args)
        call.refs = refs if isinstance(refs, list) else [refs]
        call.slot, call.actor = slot, slot.actor
        call.deadline = time.monotonic() + self.timeout

    def _next_done(self, flying: dict[ObjectRef, Flight]) -> Flight:
        """The next call that has ended, or the first that is past its deadline."""
        first = min(flying.values(), key=lambda call: call.deadline)
        ready, _ = ray.wait(list(flying), num_returns=1, timeout=max(0.0, first.deadline - time.monotonic()))
        return flying[ready[0]] if ready else first

    def _collect(self, call: Flight, results: list[Any]) -> str | None:
        """Store a call's result, or say how it was lost; raises what the actor raised."""
        *bulk, last = call.refs
        try:
            value = ray.get(last, timeout=0.0 if time.monotonic() > call.deadline else self.timeout)
        except ray.exceptions.GetTimeoutError:
            return f"did not answer within {self.timeout:.0f} s"
        except Exception as error:
            if not is_lost(error):
                raise original_error(error) from None
            return "died"
        results[call.index] = (*bulk, value) if bulk else value
        return None

    def _replace(self, slot: _Slot, what_happened: str, final: bool = False) -> None:
        if final:
            raise ActorLost(f"{what_happened}, {MAX_LOSSES + 1} times in a row; look for the cause in Ray's logs.")
        started = time.monotonic()
        self._respawn(slot, what_happened)
        if self.elastic and self.ready:
            return  # it joins when it can
        self._finish_setup(slot)
        for caught_up in self._catch_up(slot.actor):
            self._await(slot, caught_up, "catching up")
        self._tell_restart(slot, started)

    def _respawn(self, slot: _Slot, what_happened: str) -> None:
        """Start another actor in a place; raises `ActorLost` where the budget of restarts is spent."""
        self._restarts.spend(what_happened)
        kill(slot.actor)
        slot.actor, slot.home, slot.lost_at = self._spawn(slot.number), None, time.monotonic()
        slot.setup = slot.actor.setup.remote()

    def _tell_restart(self, slot: _Slot, lost_at: float) -> None:
        seconds = time.monotonic() - lost_at
        self._restarts.on_event("actor_restarted", f"{self._name(slot)} takes over after {seconds:.1f} s")

    def _finish_setup(self, slot: _Slot) -> None:
        slot.home = self._await(slot, slot.setup, "starting; it may need resources that the cluster does not have")

    def _await(self, slot: _Slot, ref: ObjectRef, doing: str) -> Any:
        try:
            return ray.get(ref, timeout=self.timeout)
        except ray.exceptions.GetTimeoutError:
            message = f"{self._name(slot)} did not answer within {self.timeout:.0f} s while {doing}"
            raise ActorLost(f"{message} (run.timeout_seconds).") from None
        except Exception as error:
            if is_lost(error):
                raise ActorLost(f"{self._name(slot)} died while {doing}; look for the cause in Ray's logs.") from error
            raise original_error(error) from None

    def _name(self, slot: _Slot) -> str:
        where = f" ({slot.home})" if slot.home else ""
        return f"{self.role} {slot.number}{where}"
