"""Who serves what: the engines in service, their versions and free slots, and the groups that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.errors import FleetLost
from rlsys.rollout.clock import Clock
from rlsys.rollout.router import EngineLoad, choose_engine


@dataclass(slots=True)
class _Engine:
    step: int | None = None
    running: int = 0
    busy_s: float = 0.0
    busy_since: float | None = None


@dataclass(frozen=True, slots=True)
class _Waiting:
    num_rollouts: int
    min_step: int
    place: asyncio.Future[str]


class Roster:
    """Engine slots, handed out oldest request first. One slot is one rollout.

    Args:
        names: the engines.
        slots: slots of each engine.
        clock: for the busy times.
    """

    def __init__(self, names: Sequence[str], *, slots: int, clock: Clock) -> None:
        self._engines = {name: _Engine() for name in names}
        self._slots = slots
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._engines)

    @property
    def num_running(self) -> int:
        return sum(engine.running for engine in self._engines.values())

    def step_of(self, name: str) -> int | None:
        return self._engines[name].step if name in self._engines else None

    async def acquire(self, num_rollouts: int, min_step: int = 0) -> str:
        """Wait for an engine with ``num_rollouts`` free slots that serves ``min_step`` or later; take the slots.

        Raises FleetLost when no engine is left.
        """
        self._check_any_left()
        if num_rollouts > self._slots:
            raise ValueError(f"{num_rollouts} rollouts at once do not fit an engine of {self._slots} slots")
        place: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(num_rollouts, min_step, place))
        self._dispatch()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.release(place.result(), num_rollouts)
            raise

    def release(self, name: str, num_rollouts: int) -> None:
        engine = self._engines.get(name)
        if engine is None:  # removed meanwhile: its slots are gone with it
            return
        engine.running -= num_rollouts
        if engine.running == 0 and engine.busy_since is not None:
            engine.busy_s += self._clock.now() - engine.busy_since
            engine.busy_since = None
        self._dispatch()

    def serve(self, name: str, step: int) -> None:
        """The engine has proven that it serves ``step``."""
        if name in self._engines:
            self._engines[name].step = step
            self._notify()

    def remove(self, name: str) -> None:
        """The engine is out of service for good; when it was the last one, everybody who waits gets FleetLost."""
        self._engines.pop(name, None)
        if not self._engines:
            while self._waiting:
                place = self._waiting.popleft().place
                if not place.done():
                    place.set_exception(FleetLost("no rollout engine is left"))
        self._notify()

    async def wait_all_serve(self, step: int) -> None:
        """Wait until every engine in service serves ``step`` or later. Raises FleetLost when none is left."""
        while True:
            self._check_any_left()
            if all(engine.step is not None and engine.step >= step for engine in self._engines.values()):
                return
            self._changed.clear()
            await self._changed.wait()

    def busy_seconds(self) -> float:
        """Seconds with at least one rollout running, averaged over the engines in service."""
        now = self._clock.now()
        busy = [
            engine.busy_s + (now - engine.busy_since if engine.busy_since is not None else 0.0)
            for engine in self._engines.values()
        ]
        return sum(busy) / len(busy) if busy else 0.0

    def describe(self) -> str:
        return ", ".join(
            f"{name} (step {engine.step}, {engine.running} running)" for name, engine in self._engines.items()
        )

    def _notify(self) -> None:
        self._changed.set()
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand out slots in order. Who waits for a newer version lets others pass; who waits for slots does not, or
        small requests would starve large ones."""
        still_waiting: deque[_Waiting] = deque()
        while self._waiting:
            request = self._waiting.popleft()
            if request.place.done():
                continue
            if not any(
                engine.step is not None and engine.step >= request.min_step for engine in self._engines.values()
            ):
                still_waiting.append(request)
                continue
            name = choose_engine(self._loads(), min_step=request.min_step, num_rollouts=request.num_rollouts)
            if name is None:
                still_waiting.append(request)
                break
            self._start(name, request)
        self._waiting.extendleft(reversed(still_waiting))

    def _start(self, name: str, request: _Waiting) -> None:
        engine = self._engines[name]
        engine.running += request.num_rollouts
        if engine.busy_since is None:
            engine.busy_since = self._clock.now()
        request.place.set_result(name)

    def _loads(self) -> list[EngineLoad]:
        return [
            EngineLoad(name=name, step=engine.step, running_rollouts=engine.running, slots=self._slots)
            for name, engine in self._engines.items()
        ]

    def _check_any_left(self) -> None:
        if not self._engines:
            raise FleetLost("no rollout engine is left")
