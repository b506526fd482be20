"""Law 8: every wait has a deadline, and its error names who was waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from rlsys.errors import WaitTimeout

Answer = TypeVar("Answer")


async def within(seconds: float, who: str, awaitable: Awaitable[Answer]) -> Answer:
    """Await with a deadline. Raises WaitTimeout naming ``who``; a TimeoutError of the awaited thing passes on."""
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await awaitable
    except TimeoutError:
        if deadline.expired():
            raise WaitTimeout(who, seconds) from None
        raise
