"""Who serves what: the engines in service, their versions and free slots, and the rollouts that wait for one."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlsys.controller.concurrency import is_overfull, usable_slots
from rlsys.errors import FleetLost
from rlsys.rollout.clock import Clock
from rlsys.rollout.router import EngineLoad, EngineReport, choose_engine


@dataclass(slots=True)
class _Engine:
    usable: int
    step: int | None = None
    running: int = 0
    busy_s: float = 0.0
    busy_since: float | None = None
    report: EngineReport | None = None
    compared: EngineReport | None = None  # the last report, where no swap came between


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A group's place in the line. All its members stand there, at whichever moment they come.

    Attributes:
        number: the order of the groups.
        min_step: of the oldest version that may play a member.
        prompt_tokens: length of the prompt, as far as it is known.
        played_by: engines that play, or have played, members.
    """

    number: int
    min_step: int
    prompt_tokens: float
    played_by: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    place: Place
    engine: asyncio.Future[str]


class Roster:
    """Engine slots, one for each rollout, handed out to the oldest group first: an engine takes no member of a group
    while one of an older group waits that it may play.

    Args:
        names: the engines.
        slots: slots of each engine. Fewer are handed out while its cache overflows.
        clock: for the busy times.
    """

    def __init__(self, names: Sequence[str], *, slots: int, clock: Clock) -> None:
        self._engines = {name: _Engine(usable=slots) for name in names}
        self._slots = slots
        self._clock = clock
        self._num_places = 0
        self._waiting: list[_Waiting] = []  # by place, then by arrival
        self._changed = asyncio.Event()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._engines)

    @property
    def num_running(self) -> int:
        return sum(engine.running for engine in self._engines.values())

    def step_of(self, name: str) -> int | None:
        return self._engines[name].step if name in self._engines else None

    @property
    def num_slots(self) -> int:
        """Slots that are handed out at present, of all engines."""
        return sum(engine.usable for engine in self._engines.values())

    def line_up(self, min_step: int = 0, prompt_tokens: float = 0.0) -> Place:
        """The last place in the line, for a group to be played by engines that serve ``min_step`` or later."""
        self._num_places += 1
        return Place(self._num_places, min_step, prompt_tokens)

    async def acquire(self, place: Place) -> str:
        """Wait for a free slot, and take it. Raises FleetLost when no engine is left."""
        self._check_any_left()
        waiting = _Waiting(place, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, waiting, key=lambda other: other.place.number)
        self._dispatch()
        try:
            return await waiting.engine
        except asyncio.CancelledError:
            if waiting.engine.done() and not waiting.engine.cancelled() and waiting.engine.exception() is None:
                self.release(waiting.engine.result())
            raise

    def release(self, name: str) -> None:
        engine = self._engines.get(name)
        if engine is None:  # removed meanwhile: its slots are gone with it
            return
        engine.running -= 1
        if engine.running == 0 and engine.busy_since is not None:
            engine.busy_s += self._clock.now() - engine.busy_since
            engine.busy_since = None
        self._dispatch()

    def observe(self, name: str, report: EngineReport) -> None:
        """What the engine says of itself: it guides the choice of an engine, and how many slots are handed out."""
        engine = self._engines.get(name)
        if engine is None:
            return
        engine.usable = usable_slots(
            engine.usable,
            slots=self._slots,
            running=engine.running,
            is_overfull=is_overfull(report, engine.compared),
        )
        engine.report = engine.compared = report
        self._dispatch()

    def serve(self, name: str, step: int) -> None:
        """The engine has proven that it serves ``step``."""
        if name in self._engines:
            self._engines[name].step = step
            self._engines[name].compared = None  # a swap throws every request out of the cache
            self._notify()

    def remove(self, name: str) -> None:
        """The engine is out of service for good; when it was the last one, everybody who waits gets FleetLost."""
        self._engines.pop(name, None)
        if not self._engines:
            waiting, self._waiting = self._waiting, []
            for one in waiting:
                if not one.engine.done():
                    one.engine.set_exception(FleetLost("no rollout engine is left"))
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
        """Hand out slots in order. Who finds no slot where he may be played lets others pass, to engines on which he
        may not be."""
        still_waiting = []
        loads = {name: self._load(name) for name in self._engines}
        for index, waiting in enumerate(self._waiting):
            if waiting.engine.done():
                continue
            if not any(load.free_slots for load in loads.values()):
                still_waiting += self._waiting[index:]
                break
            place = waiting.place
            name = choose_engine(
                tuple(loads.values()),
                min_step=place.min_step,
                prompt_tokens=place.prompt_tokens,
                played_by=place.played_by,
            )
            if name is None:
                still_waiting.append(waiting)
            else:
                self._start(name, waiting)
                loads[name] = self._load(name)
        self._waiting = still_waiting

    def _start(self, name: str, waiting: _Waiting) -> None:
        engine = self._engines[name]
        engine.running += 1
        if engine.busy_since is None:
            engine.busy_since = self._clock.now()
        waiting.place.played_by.add(name)
        waiting.engine.set_result(name)

    def _load(self, name: str) -> EngineLoad:
        engine = self._engines[name]
        return EngineLoad(
            name=name,
            step=engine.step,
            running_rollouts=engine.running,
            slots=engine.usable,
            report=engine.report,
        )

    def _check_any_left(self) -> None:
        if not self._engines:
            raise FleetLost("no rollout engine is left")
