"""Virtual time: an asyncio event loop that jumps to the next timer instead of waiting for it.

Everything that asyncio does with time (sleep, timeout) then happens in virtual time; a run of hours takes moments, and
the same inputs give the same order of events. When nothing is ready and no timer is set, everybody waits for ever:
that is raised, not slept through.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from rlsys.errors import RlsysError

Answer = TypeVar("Answer")


class Deadlock(RlsysError):
    """Every task waits for another one, and no deadline is set (law 8)."""


class _JumpingSelector(selectors.DefaultSelector):
    """Returns at once, and moves the time by as long as it was told to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise Deadlock("nothing is ready and no timer is set: everybody waits for ever")
            self.now_s += max(0.0, timeout)
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time, which starts at 0."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


class VirtualClock:
    """A virtual time with its event loop. Hand it to whatever asks for a clock, then ``run``."""

    def __init__(self) -> None:
        self._loop = VirtualLoop()

    def now(self) -> float:
        """Seconds, from 0."""
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def run(self, main: Coroutine[Any, Any, Answer]) -> Answer:
        """Run a coroutine to its end in virtual time; once per clock. Raises Deadlock, and what ``main`` raises."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            return runner.run(main)
