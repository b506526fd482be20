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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rlsys.errors import RlsysError
from rlsys.records import DropCause, Prompt
from rlsys.reward.load import RewardFunction, arguments_for, is_async_reward
from rlsys.reward.result import Completion, Outcome, RewardFailure, RewardResult


class DeadlinePassed(BaseException):
    """Raised inside the user's code at its deadline. No Exception, so that ``except Exception`` lets it through."""


class NoNumber(ValueError):
    """What a reward function returned is not a finite number."""


def score_members(
    function: RewardFunction, prompt: Prompt, completions: list[Completion], timeout_s: float
) -> list[Outcome]:
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
    """What the function returned, as a reward of plain numbers. Raises NoNumber."""
    if not isinstance(value, RewardResult):
        return RewardResult(reward=_number("the reward", value))
    if not isinstance(value.parts, Mapping):
        raise NoNumber(f"RewardResult.parts is {reprlib.repr(value.parts)}; it must map names to numbers")
    turns, tokens = _numbers("turn_rewards", value.turn_rewards), _numbers("token_rewards", value.token_rewards)
    return RewardResult(
        reward=_whole(value.reward, turns, tokens),
        parts={str(name): _number(f"the part {name!r} of the reward", part) for name, part in value.parts.items()},
        turn_rewards=turns,
        token_rewards=tokens,
    )


def _whole(reward: Any, turns: tuple[float, ...] | None, tokens: tuple[float, ...] | None) -> float:
    if reward is None and turns is not None and tokens is not None:
        raise NoNumber(
            "RewardResult.reward is None beside turn_rewards and token_rewards: give it, or one of them only"
        )
    if reward is None and (turns is not None or tokens is not None):
        reward = math.fsum(turns or tokens or ())
    return _number("the reward", reward)


def _numbers(name: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise NoNumber(f"RewardResult.{name} is {reprlib.repr(values)}; it must be a sequence of numbers")
    return tuple(_number(f"RewardResult.{name}[{index}]", value) for index, value in enumerate(values))


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
