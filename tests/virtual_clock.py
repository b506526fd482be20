"""A clock whose time moves only when everybody waits."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Coroutine
from typing import Any

_TICKS = 50  # event-loop rounds after which whoever could go on has gone on


class VirtualClock:
    def __init__(self) -> None:
        self._now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._num = 0

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        self._num += 1
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, self._num, woken))
        await woken

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run to the end in an event loop of its own; raises RuntimeError if everybody waits for nothing."""
        return asyncio.run(self._drive(coroutine))

    async def _drive(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.create_task(coroutine)
        while True:
            for _ in range(_TICKS):
                await asyncio.sleep(0)
            if task.done():
                return task.result()
            while self._sleepers and self._sleepers[0][2].done():  # cancelled
                heapq.heappop(self._sleepers)
            if not self._sleepers:
                task.cancel()
                raise RuntimeError(f"deadlock at {self._now} s")
            self._now, _, woken = heapq.heappop(self._sleepers)
            woken.set_result(None)
