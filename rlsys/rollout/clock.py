"""Time as the rollout side needs it, handed in so that the simulator can bend it."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary start, monotonic."""
        ...

    async def sleep(self, seconds: float) -> None: ...
