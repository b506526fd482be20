"""Remote calls, with Ray's errors turned into ours at this one place."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

from rlsys.errors import RlsysError

Answer = TypeVar("Answer")


async def answer(call: Awaitable[Answer], who: str, lost: type[RlsysError]) -> Answer:
    """Await a remote call.

    Raises:
        RlsysError: the very error that was raised over there, where it is one of ours.
        lost: the actor died, or failed in a way that nobody planned for (its traceback is in the message).
    """
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, RlsysError):
            raise error.cause from None
        raise lost(f"{who} failed:\n{error}") from None
    except RayActorError as error:
        raise lost(f"{who} died: {error}") from None
    except RayError as error:
        raise lost(f"{who} cannot be reached: {error}") from None
