"""What a reward function may return, and what became of one call of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlsys.errors import RlsysError
from rlsys.records import DropCause


@dataclass(frozen=True, slots=True)  # users write RewardResult(1.0, {...}) too: not keyword-only
class RewardResult:
    """A reward with named parts, which become metrics. A bare number says the same without parts.

    Example:
        >>> RewardResult(reward=0.9, parts={"right": 1.0, "too_long": -0.1}).reward
        0.9
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFailure:
    """One call that gave no reward (law 6: that is not a reward of 0).

    Attributes:
        cause: REWARD_ERROR, REWARD_TIMEOUT or REWARD_CRASH.
        detail: the traceback of the user's code, or a sentence.
    """

    cause: DropCause
    detail: str


Outcome = RewardResult | RewardFailure


class WorkerDied(RlsysError):
    """The process of a reward worker died while it held a request."""
