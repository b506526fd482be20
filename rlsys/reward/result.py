"""What a reward function is asked about, what it may return, and what became of one call of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from rlsys.errors import RlsysError
from rlsys.records import NOT_SAMPLED, DropCause, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a policy did in one rollout, for a reward function to judge.

    Attributes:
        text: of the last answer, without special tokens.
        token_ids: every sampled token of the rollout, those of all its turns one after another.
        turn_lengths: sampled tokens of each turn; they add up to the number of ``token_ids``.

    Example:
        >>> Completion(text="46", token_ids=(4, 6, 2), turn_lengths=(3,)).turn_lengths
        (3,)
    """

    text: str
    token_ids: tuple[int, ...]
    turn_lengths: tuple[int, ...]

    @classmethod
    def of(cls, rollout: Rollout) -> Self:
        sampled_T = rollout.versions_T != NOT_SAMPLED
        ends_U = sampled_T.cumsum()[rollout.turn_ends]
        return cls(
            text=rollout.completion,
            token_ids=tuple(rollout.token_ids_T[sampled_T].tolist()),
            turn_lengths=tuple((ends_U - [0, *ends_U[:-1]]).tolist()),
        )


@dataclass(frozen=True, slots=True)  # users write RewardResult(1.0, {...}) too: not keyword-only
class RewardResult:
    """A reward with named parts, which become metrics. A bare number says the same without parts.

    Attributes:
        reward: of the whole; None is the sum of ``turn_rewards`` or of ``token_rewards``.
        turn_rewards: one for each turn.
        token_rewards: one for each sampled token, those of all turns one after another (``completion_ids``).

    Example:
        >>> RewardResult(reward=0.9, parts={"right": 1.0, "too_long": -0.1}).reward
        0.9
    """

    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    turn_rewards: Sequence[float] | None = None
    token_rewards: Sequence[float] | None = None


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
