"""Who is in service: engines come and go while the run goes on, and nobody else is paused for it.

One mechanism for all of it: a number of engines is wanted (or as many as there is room for), and again and again it is
compared with what stands. So a lost engine is replaced, a machine that joins gets engines, and one that leaves takes
its engines along; what they play goes on elsewhere, inside its groups, or is played again where nothing is left of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from rlsys.controller.deadline import within
from rlsys.controller.parts import Parts, Survey
from rlsys.controller.plan import Plan
from rlsys.controller.roster import Roster
from rlsys.controller.watch import watch_loop
from rlsys.errors import EngineLost, FleetLost, RlsysError, WaitTimeout

LOOK_PERIOD_S = 2.0
LOOK_TIMEOUT_S = 20.0
MOVE_TIMEOUT_S = 20.0  # for an engine that has to go to hand out what it plays
STEADY_S = 300.0  # an engine that is lost sooner than this after it came failed
MAX_FAILURES = 3  # in a row on one machine, before it is given up
ALONE_S = 60.0  # without an engine and room for one, before the run ends; what an engine held is not free at once

Pull = Callable[[str], Coroutine[Any, Any, None]]


def places_for(room: Mapping[str, int], num: int) -> list[str]:
    """Machines for ``num`` new engines, or for as many as there is room for: one after the other where most is left.

    Example:
        >>> places_for({"a": 1, "b": 3}, 3)
        ['b', 'b', 'a']
    """
    left, places = {machine: free for machine, free in room.items() if free > 0}, []
    for _ in range(min(num, sum(left.values()))):
        machine = min(left, key=lambda name: (-left[name], name))
        left[machine] -= 1
        places.append(machine)
    return places


@dataclass(frozen=True, kw_only=True, slots=True)
class _Engine:
    machine: str
    asked_at: float  # when it was to start
    came_at: float | None = None  # None: it has not come up yet


class Crew:
    """Adds engines to the roster, and removes them."""

    def __init__(self, parts: Parts, plan: Plan, roster: Roster) -> None:
        self._fleet, self._machines, self._clock, self._sink = parts.fleet, parts.machines, parts.clock, parts.sink
        self._plan, self._roster = plan, roster
        now = self._clock.now()
        self._engines = {
            name: _Engine(machine=machine, asked_at=now, came_at=now)
            for name, machine in self._machines.engines().items()
        }
        self._num_named = len(self._engines)
        self._failures = Counter[str]()  # in a row, by machine
        self._failed_at: dict[str, float] = {}
        self._last_loss = ""
        self._alone_since: float | None = None
        self._is_blind = False  # the last look failed
        self._num_joined = self._num_lost = 0

    def counts(self) -> dict[str, float]:
        """Engines since the start."""
        return {"rollout/engines_joined": self._num_joined, "rollout/engines_lost": self._num_lost}

    async def fleet_loop(self, pull: Pull) -> None:
        """Keep as many engines in service as are wanted.

        consumes: what the machines say: room, and engines whose machine leaves.
        waits for: the next look; each new engine to come up, beside all others.
        unblocked by: the clock; machines.start.
        produces: engines in the roster, each with a loop that ``pull``s and one that watches; the loss of those whose
            machine leaves. Raises FleetLost where there is none and none can come.
        """
        async with asyncio.TaskGroup() as tasks:
            for name in self._roster.names:
                self._tend(name, pull, tasks)
            while True:
                await self._clock.sleep(LOOK_PERIOD_S)
                survey = await self._look()
                for name in sorted(survey.leaving):
                    if self._retire(name, "its machine leaves"):
                        tasks.create_task(self._clear(name))
                for machine in self._next_places(survey.room):
                    name = f"rollout-{self._num_named}"
                    self._num_named += 1
                    self._engines[name] = _Engine(machine=machine, asked_at=self._clock.now())
                    tasks.create_task(self._bring_up(name, machine, pull, tasks))
                self._check_any_can_come()

    async def lose(self, engine: str, reason: str) -> None:
        """Take an engine out of service; what it plays is lost with it."""
        if self._retire(engine, reason):
            await self._remove(engine)

    def _retire(self, engine: str, reason: str) -> bool:
        """Hand out none of its slots any more. False where it was out of service already."""
        if engine not in self._roster.names:
            return False
        self._sink.event(f"{engine} is out of service: {reason}")
        self._num_lost += 1
        self._roster.remove(engine)
        self._leave(engine, reason)
        return True

    async def _clear(self, engine: str) -> None:
        """Let what a retired engine plays go on elsewhere, then remove it."""
        try:
            await within(MOVE_TIMEOUT_S, f"{engine} to let go what it plays", self._fleet.interrupt(engine))
        except RlsysError as error:  # it is gone already, or hangs: what it played is lost with it
            self._sink.event(f"{engine}: {error}")
        await self._remove(engine)

    async def _remove(self, engine: str) -> None:
        try:
            await within(self._plan.play_timeout_s, f"{engine} to stop", self._fleet.remove(engine))
        except RlsysError as error:  # it is out of service already; that it would not stop is only worth a line
            self._sink.event(f"{engine}: {error}")

    async def _look(self) -> Survey:
        try:
            survey = await within(
                LOOK_TIMEOUT_S, "the machines to say what they have room for", self._machines.survey()
            )
        except RlsysError as error:  # engines that stand go on; the next look may tell more
            if not self._is_blind:
                self._sink.event(f"no engine is started or replaced for now: {error}")
            self._is_blind = True
            return Survey(room={}, leaving=frozenset())
        self._is_blind = False
        return survey

    def _next_places(self, room: Mapping[str, int]) -> list[str]:
        room = {machine: free for machine, free in room.items() if self._failures[machine] < MAX_FAILURES}
        wanted = self._plan.replicas
        return places_for(room, sum(room.values()) if wanted is None else max(0, wanted - len(self._engines)))

    def _tend(self, name: str, pull: Pull, tasks: asyncio.TaskGroup) -> None:
        """Start what goes on for as long as the engine stands."""
        tasks.create_task(pull(name))
        tasks.create_task(
            watch_loop(
                name,
                self._fleet,
                self._roster,
                self._clock,
                lose=self.lose,
                timeout_s=self._plan.play_timeout_s,
            )
        )

    async def _bring_up(self, name: str, machine: str, pull: Pull, tasks: asyncio.TaskGroup) -> None:
        self._sink.event(f"{name} starts on {machine}")
        try:
            starting = self._machines.start(name, machine)
            await within(self._plan.start_timeout_s, f"{name} to start on {machine}", starting)
        except (EngineLost, WaitTimeout) as error:
            self._sink.event(f"{name} did not start: {error}")
            self._leave(name, str(error))
            return
        self._engines[name] = _Engine(machine=machine, asked_at=self._engines[name].asked_at, came_at=self._clock.now())
        self._num_joined += 1
        self._roster.add(name)
        self._tend(name, pull, tasks)

    def _leave(self, name: str, reason: str) -> None:
        """Book the end of an engine. Those that fail together count as one failure of their machine."""
        engine, now = self._engines.pop(name), self._clock.now()
        self._last_loss = f"{name}: {reason}"
        if engine.came_at is not None and now - engine.came_at >= STEADY_S:
            self._failures[engine.machine] = 0
        elif engine.asked_at >= self._failed_at.get(engine.machine, engine.asked_at):
            self._failures[engine.machine] += 1
            if self._failures[engine.machine] == MAX_FAILURES:
                self._sink.event(
                    f"{engine.machine} is given up: engines failed there {MAX_FAILURES} times in a row; the last one, "
                    f"{self._last_loss}"
                )
        self._failed_at[engine.machine] = now

    def _check_any_can_come(self) -> None:
        """Raises FleetLost where there was no engine for ``ALONE_S``, neither in service nor on its way."""
        now = self._clock.now()
        if self._engines:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since >= ALONE_S:
            raise FleetLost(
                f"no rollout engine is left, and for {ALONE_S:.0f} s there was no room for another; the last one, "
                f"{self._last_loss}"
            )
