"""The way to one rollout worker and back. What is asked for in one moment goes over in one call, and whatever has ended
since comes back in one: a call costs about a millisecond of the driver's time, as much as a short rollout itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from rlsys.actors.remote import answer
from rlsys.errors import EngineLost, RlsysError
from rlsys.records import Prompt
from rlsys.rollout.clock import Clock
from rlsys.rollout.play import Member, Played, Player, PlaySpec

Order = tuple[int, Prompt, Member, PlaySpec]  # the number is the mailbox's own
Ended = tuple[int, Played]

GATHER_S = 0.02  # what ends so soon after another one comes back in the same call
MOST_GATHER_S = 0.1  # the same, while the engine is full without it


class Mailbox:
    """The driver's end.

    Args:
        worker: actor with the methods ``begin`` and ``ended`` of ``Tray``.
        engine: its name, for errors.
    """

    def __init__(self, worker: Any, engine: str) -> None:
        self._worker, self._engine = worker, engine
        self._next_number = 0
        self._outgoing: list[Order] = []
        self._cancelled: list[int] = []
        self._waiting: dict[int, asyncio.Future[Played]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def play(self, prompt: Prompt, member: Member, spec: PlaySpec) -> Played:
        """Raises EngineLost. Where it is cancelled the worker stops playing."""
        number, self._next_number = self._next_number, self._next_number + 1
        ended = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._outgoing.append((number, prompt, member, spec))
        self._ensure(self._send)
        self._ensure(self._collect)
        try:
            return await ended
        except asyncio.CancelledError:
            self._cancelled.append(number)
            self._ensure(self._send)
            raise
        finally:
            self._waiting.pop(number, None)

    async def emptied(self) -> None:
        """Wait until nobody waits for a rollout any more."""
        while self._waiting:
            await asyncio.wait(self._waiting.values())
            await asyncio.sleep(0)  # they leave ``_waiting`` themselves

    def close(self) -> None:
        """Ask the worker nothing any more; whoever still waits gets EngineLost."""
        for task in self._tasks.values():
            task.cancel()
        self._fail(EngineLost(f"{self._engine} is out of service"))

    def _ensure(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = self._tasks.get(work.__name__)
        if task is None or task.done():
            self._tasks[work.__name__] = asyncio.create_task(work())

    async def _send(self) -> None:
        while self._outgoing or self._cancelled:
            orders, self._outgoing = self._outgoing, []
            cancelled, self._cancelled = self._cancelled, []
            await self._or_fail(self._worker.begin.remote(orders, cancelled))

    async def _collect(self) -> None:
        while self._waiting:
            for number, rollout in await self._or_fail(self._worker.ended.remote()):
                ended = self._waiting.get(number)
                if ended is not None and not ended.done():
                    ended.set_result(rollout)
            await asyncio.sleep(0)  # they leave ``_waiting`` themselves

    async def _or_fail(self, call: Any) -> Any:
        """The answer, or else the failure of everything that is under way."""
        try:
            return await answer(call, self._engine, EngineLost)
        except RlsysError as error:
            self._fail(error)
            return ()

    def _fail(self, error: RlsysError) -> None:
        for ended in self._waiting.values():
            if not ended.done():
                ended.set_exception(error)


class Tray:
    """The worker's end: rollouts that are being played, and those that have ended and were not yet collected.

    Args:
        slots: of the engine. While as many are being played, what has ended makes no room that could be used.
    """

    def __init__(self, player: Player, clock: Clock, slots: int) -> None:
        self._player, self._clock, self._slots = player, clock, slots
        self._playing: dict[int, asyncio.Task[None]] = {}
        self._ended: list[Ended] = []
        self._failure: BaseException | None = None
        self._something = asyncio.Event()

    def begin(self, orders: Sequence[Order], cancelled: Sequence[int]) -> None:
        """Play ``orders``, and stop those of these numbers. What is stopped is not among what has ended."""
        for order in orders:
            self._playing[order[0]] = asyncio.create_task(self._play(*order))
        for number in cancelled:
            if number in self._playing:
                self._playing.pop(number).cancel()

    async def ended(self) -> list[Ended]:
        """What has ended since the last call, at least one, and what ends a moment later. Raises what playing raised:
        then the worker is of no more use."""
        await self._something.wait()
        latest_s = self._clock.now() + MOST_GATHER_S
        if self._playing:  # else there is nothing to wait for
            await self._clock.sleep(GATHER_S)
        while len(self._playing) >= self._slots and self._failure is None and self._clock.now() < latest_s:
            await self._clock.sleep(GATHER_S)
        if self._failure is not None:
            raise self._failure
        self._something.clear()
        ended, self._ended = self._ended, []
        return ended

    async def _play(self, number: int, prompt: Prompt, member: Member, spec: PlaySpec) -> None:
        try:
            rollout = await self._player.play_rollout(prompt, member, spec)
            self._ended.append((number, rollout))
        except Exception as error:  # handed on to whoever collects
            self._failure = self._failure or error
        self._playing.pop(number, None)
        self._something.set()
