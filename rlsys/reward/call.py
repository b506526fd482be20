"""Call a reward function, inside a reward worker process. What goes wrong there is told apart from a reward.

Deadlines are soft here: an exception raised inside the user's code. Code that swallows it, or that blocks in C, is
ended from outside, by the pool that kills the process (``pool.py``).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
import reprlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rlsys.errors import RlsysError
from rlsys.records import DropCause, Prompt
from rlsys.reward.load import RewardFunction, arguments_for, is_async_reward
from rlsys.reward.result import Outcome, RewardFailure, RewardResult


class DeadlinePassed(BaseException):
    """Raised inside the user's code at its deadline. No Exception, so that ``except Exception`` lets it through."""


class NoNumber(ValueError):
    """What a reward function returned is not a finite number."""


def score_members(function: RewardFunction, prompt: Prompt, completions: list[str], timeout_s: float) -> list[Outcome]:
    """Score the completions of one prompt; the outcomes stand in the order of ``completions``.

    A plain function is called one completion after another, each with ``timeout_s`` of its own, kept by SIGALRM: this
    must run in the main thread of its process. An async function is called for all completions at once, each with
    ``timeout_s``, on one event loop that lives as long as the process (clients that user code keeps are bound to it);
    it must not block that loop, and no loop may be running in the calling thread.

    Raises:
        RlsysError: a plain function, and this is not the main thread.
    """
    calls = [functools.partial(function, **arguments_for(function, prompt, completion)) for completion in completions]
    if is_async_reward(function):
        return _process_loop().run(_score_at_once(calls, timeout_s))
    if threading.current_thread() is not threading.main_thread():
        raise RlsysError(
            "a plain reward function was called outside the main thread of its process, where SIGALRM cannot end it. "
            "Run score_members in the main thread (a plain Ray actor without concurrency groups)."
        )
    return [_score_plain(call, timeout_s) for call in calls]


def _score_plain(call: Callable[[], Any], timeout_s: float) -> Outcome:
    alarm = _Alarm()
    try:
        with alarm.set(timeout_s):
            outcome: Outcome = _read(call())
    except KeyboardInterrupt:
        raise  # from the person at the terminal or from a cancelled call, not from the reward function
    except BaseException:  # user code may end in SystemExit or worse
        outcome = RewardFailure(cause=DropCause.REWARD_ERROR, detail=traceback.format_exc())
    # A function that swallows the alarm and returns 0 has timed out all the same.
    return _timed_out(timeout_s) if alarm.rang else outcome


async def _score_at_once(calls: Sequence[Callable[[], Any]], timeout_s: float) -> list[Outcome]:
    return list(await asyncio.gather(*(_score_async(call, timeout_s) for call in calls)))


async def _score_async(call: Callable[[], Any], timeout_s: float) -> Outcome:
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            outcome: Outcome = _read(await call())
    except KeyboardInterrupt:
        raise
    except BaseException:  # as above; a cancellation here is the deadline's, or the user's own
        outcome = RewardFailure(cause=DropCause.REWARD_ERROR, detail=traceback.format_exc())
    return _timed_out(timeout_s) if deadline.expired() else outcome


class _Alarm:
    """SIGALRM as a deadline of one call. ``rang`` stays True even where the user's code swallowed the exception."""

    def __init__(self) -> None:
        self.rang = False

    @contextmanager
    def set(self, seconds: float) -> Iterator[None]:
        previous = signal.signal(signal.SIGALRM, self._ring)  # anew for each call: user code may set its own
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        self.rang = True
        raise DeadlinePassed


@functools.cache
def _process_loop() -> asyncio.Runner:
    return asyncio.Runner(loop_factory=asyncio.new_event_loop)


def _timed_out(timeout_s: float) -> RewardFailure:
    return RewardFailure(
        cause=DropCause.REWARD_TIMEOUT, detail=f"the reward function gave nothing within reward.timeout_s={timeout_s:g}"
    )


def _read(value: Any) -> RewardResult:
    """What the function returned, as a reward. Raises NoNumber."""
    if not isinstance(value, RewardResult):
        return RewardResult(reward=_number("the reward", value))
    if not isinstance(value.parts, Mapping):
        raise NoNumber(f"RewardResult.parts is {reprlib.repr(value.parts)}; it must map names to numbers")
    return RewardResult(
        reward=_number("the reward", value.reward),
        parts={str(name): _number(f"the part {name!r} of the reward", part) for name, part in value.parts.items()},
    )


def _number(what: str, value: Any) -> float:
    if inspect.iscoroutine(value):
        value.close()
        raise NoNumber(f"{what} is a coroutine: a function that returns one must be declared with `async def`")
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # scalars of numpy and torch
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise NoNumber(
            f"{what} is {reprlib.repr(value)} ({type(value).__name__}); it must be a finite number or a RewardResult"
        )
    number = float(value)
    if not math.isfinite(number):
        raise NoNumber(f"{what} is {number}; it must be a finite number")
    return number
