"""Who serves what: the engines in service, their versions and free slots, and the rollouts that wait for one."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlsys.controller.concurrency import is_overfull, usable_slots
from rlsys.rollout.clock import Clock
from rlsys.rollout.router import EngineLoad, EngineReport, choose_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSeconds:
    """Seconds since the start, added up over all engines that are or were in service.

    Attributes:
        in_service: from the first version that an engine has proven until it is out of service.
        busy: of these, with at least one rollout running.
    """

    in_service: float
    busy: float


@dataclass(slots=True)
class _Engine:
    usable: int
    is_newcomer: bool  # came later, and has proven no version yet
    step: int | None = None
    running: int = 0
    serves_since: float | None = None
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

    While no engine is in service everybody waits: the crew ends the run where none can come.

    Args:
        names: the engines of the start. Others may come and all may go.
        slots: slots of each engine. Fewer are handed out while its cache overflows.
        clock: for the busy times.
    """

    def __init__(self, names: Sequence[str], *, slots: int, clock: Clock) -> None:
        self._engines = {name: _Engine(usable=slots, is_newcomer=False) for name in names}
        self._gone = EngineSeconds(in_service=0.0, busy=0.0)  # of those that are out of service
        self._slots = slots
        self._clock = clock
        self._num_places = 0
        self._waiting: list[_Waiting] = []  # by place, then by arrival
        self._changed = asyncio.Event()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._engines)

    @property
    def num_in_service(self) -> int:
        """Engines that have proven a version."""
        return sum(engine.step is not None for engine in self._engines.values())

    @property
    def num_running(self) -> int:
        return sum(engine.running for engine in self._engines.values())

    def step_of(self, name: str) -> int | None:
        return self._engines[name].step if name in self._engines else None

    def is_newcomer(self, name: str) -> bool:
        """Whether the engine came later than the others and has proven no version yet."""
        return name in self._engines and self._engines[name].is_newcomer

    @property
    def num_slots(self) -> int:
        """Slots that are handed out at present, of all engines."""
        return sum(engine.usable for engine in self._engines.values())

    def line_up(self, min_step: int = 0, prompt_tokens: float = 0.0) -> Place:
        """The last place in the line, for a group to be played by engines that serve ``min_step`` or later."""
        self._num_places += 1
        return Place(self._num_places, min_step, prompt_tokens)

    async def acquire(self, place: Place) -> str:
        """Wait for a free slot, and take it."""
        waiting = _Waiting(place, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, waiting, key=lambda other: other.place.number)
        self._dispatch()
        try:
            return await waiting.engine
        except asyncio.CancelledError:
            if waiting.engine.done() and not waiting.engine.cancelled():
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
        engine = self._engines.get(name)
        if engine is None:
            return
        engine.step, engine.is_newcomer = step, False
        engine.compared = None  # a swap throws every request out of the cache
        if engine.serves_since is None:
            engine.serves_since = self._clock.now()
        self._notify()

    def add(self, name: str) -> None:
        """An engine has come. It plays from the first version on that it proves. Raises ValueError for a name that
        stands here."""
        if name in self._engines:
            raise ValueError(f"{name} is here already")
        self._engines[name] = _Engine(usable=self._slots, is_newcomer=True)
        self._notify()

    def remove(self, name: str) -> None:
        """The engine is out of service for good, and its slots with it."""
        engine = self._engines.pop(name, None)
        if engine is not None:
            in_service, busy = self._seconds_of(engine)
            self._gone = EngineSeconds(in_service=self._gone.in_service + in_service, busy=self._gone.busy + busy)
            self._notify()

    async def wait_all_serve(self, step: int) -> None:
        """Wait until every engine serves ``step`` or later, newcomers excepted: those play nothing before. There must
        be one at least."""
        while True:
            engines = [engine for engine in self._engines.values() if not engine.is_newcomer]
            if engines and all(engine.step is not None and engine.step >= step for engine in engines):
                return
            self._changed.clear()
            await self._changed.wait()

    def seconds(self) -> EngineSeconds:
        """Until now."""
        present = [self._seconds_of(engine) for engine in self._engines.values()]
        return EngineSeconds(
            in_service=self._gone.in_service + sum(in_service for in_service, _ in present),
            busy=self._gone.busy + sum(busy for _, busy in present),
        )

    def describe(self) -> str:
        if not self._engines:
            return "no engine is in service"
        return ", ".join(
            f"{name} (step {engine.step}, {engine.running} running)" for name, engine in self._engines.items()
        )

    def _seconds_of(self, engine: _Engine) -> tuple[float, float]:
        """Seconds in service, and busy ones."""
        now = self._clock.now()
        in_service = now - engine.serves_since if engine.serves_since is not None else 0.0
        return in_service, engine.busy_s + (now - engine.busy_since if engine.busy_since is not None else 0.0)

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
