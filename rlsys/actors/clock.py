"""The real clock, the one that is handed to the controller outside the simulator."""

from __future__ import annotations

import asyncio
import time


class WallClock:
    def now(self) -> float:
        """Seconds, monotonic."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
