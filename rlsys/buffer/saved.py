"""Groups as arrays and plain JSON, and back: how finished rollouts outlive the process that holds them.

Legend: S rollouts of all groups together, N tokens of all rollouts one after another, T tokens of one rollout, K
candidates of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.errors import CheckpointDamaged
from rlsys.records import DropCause, DroppedRollout, Prompt, Rollout, RolloutGroup, StopReason, TeacherScores

Arrays = dict[str, NDArray[Any]]
PromptOf = Callable[[int, int, int], Prompt]  # index, epoch, attempt of a draw

_TYPES = {
    "token_ids_T": np.dtype(np.int32),
    "loss_mask_T": np.dtype(np.bool_),
    "behaviour_logprobs_T": np.dtype(np.float32),
    "versions_T": np.dtype(np.int64),
}
_SOME: Mapping[str, np.dtype[Any]] = {  # what not every rollout has, flat
    "token_rewards": np.dtype(np.float64),
    "teacher_logprobs": np.dtype(np.float32),
    "candidate_ids": np.dtype(np.int32),
    "candidate_logprobs": np.dtype(np.float32),
}


def groups_to_arrays(groups: Sequence[RolloutGroup]) -> tuple[Arrays, dict[str, Any]]:
    """Everything per token as arrays: four of [N], with the lengths [S] that cut them, and one for each thing that only
    some rollouts have, with its sizes in the plain part. The rest is plain JSON.

    A prompt is saved as index, epoch and attempt of its draw: the source can ask it again.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    arrays: Arrays = {
        name: np.concatenate([np.zeros(0, dtype), *(getattr(rollout, name) for rollout in rollouts)], dtype=dtype)
        for name, dtype in _TYPES.items()
    }
    arrays["lengths_S"] = np.array([len(rollout.token_ids_T) for rollout in rollouts], dtype=np.int64)
    some = [_some_arrays(rollout) for rollout in rollouts]
    for name, dtype in _SOME.items():
        arrays[name] = np.concatenate([np.zeros(0, dtype), *(own[name] for own in some if name in own)], dtype=dtype)
    return arrays, {"groups": [_plain_group(group) for group in groups]}


def groups_from_arrays(
    arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any], prompt_of: PromptOf
) -> tuple[RolloutGroup, ...]:
    """The groups that ``groups_to_arrays`` was given. Their token arrays are views into ``arrays``.

    Args:
        prompt_of: the prompt of a draw, by index, epoch and attempt.

    Raises:
        CheckpointDamaged: arrays and plain part do not fit each other.
    """
    lengths_S = arrays["lengths_S"]
    num_rollouts = sum(len(group["rollouts"]) for group in plain["groups"])
    sizes = {name: len(arrays[name]) for name in _TYPES}
    if len(lengths_S) != num_rollouts or set(sizes.values()) != {int(lengths_S.sum())}:
        raise CheckpointDamaged(
            f"saved groups do not fit together: {num_rollouts} rollouts, {len(lengths_S)} lengths that sum to "
            f"{int(lengths_S.sum())}, arrays of {sizes}"
        )
    cuts = np.cumsum(lengths_S)[:-1]
    parts = {name: iter(np.split(arrays[name], cuts)) for name in _TYPES}
    some = _Flat(arrays)
    groups = tuple(
        RolloutGroup(
            prompt=prompt_of(*group["draw"]),
            rollouts=tuple(
                _rollout(rollout, {name: next(part) for name, part in parts.items()}, some)
                for rollout in group["rollouts"]
            ),
            dropped=tuple(
                DroppedRollout(rollout_id=rollout_id, cause=DropCause(cause), detail=detail)
                for rollout_id, cause, detail in group["dropped"]
            ),
            dropped_rewards=tuple(group["dropped_rewards"]),
            dropped_parts=tuple(group["dropped_parts"]),
            greedy_reward=group["greedy_reward"],
        )
        for group in plain["groups"]
    )
    some.check_used_up()
    return groups


class _Flat:
    """Cuts the flat arrays of what only some rollouts have, from the front."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._rest = {name: arrays[name] for name in _SOME}

    def cut(self, name: str, *shape: int) -> NDArray[Any]:
        size = math.prod(shape)
        found, self._rest[name] = np.split(self._rest[name], [size])
        if len(found) != size:
            raise CheckpointDamaged(f"saved groups do not fit together: {name} is too short")
        return found.reshape(shape)

    def check_used_up(self) -> None:
        if any(len(rest) for rest in self._rest.values()):
            left = {name: len(rest) for name, rest in self._rest.items()}
            raise CheckpointDamaged(f"saved groups do not fit together: left over are {left}")


def _plain_group(group: RolloutGroup) -> dict[str, Any]:
    draw = group.prompt.draw
    return {
        "draw": [draw.index, draw.epoch, group.prompt.attempt],
        "rollouts": [_plain_rollout(rollout) for rollout in group.rollouts],
        "dropped": [[lost.rollout_id, lost.cause.value, lost.detail] for lost in group.dropped],
        "dropped_rewards": [float(reward) for reward in group.dropped_rewards],
        "dropped_parts": [_numbers(parts) for parts in group.dropped_parts],
        "greedy_reward": None if group.greedy_reward is None else float(group.greedy_reward),
    }


def _some_arrays(rollout: Rollout) -> Arrays:
    """What the rollout has of ``_SOME``, flat."""
    own: Arrays = {}
    if rollout.token_rewards is not None:
        own["token_rewards"] = np.asarray(rollout.token_rewards, dtype=np.float64)
    if rollout.teacher is not None:
        own["teacher_logprobs"] = rollout.teacher.logprobs_T
        own["candidate_ids"] = rollout.teacher.candidate_ids_TK.ravel()
        own["candidate_logprobs"] = rollout.teacher.candidate_logprobs_TK.ravel()
    return own


def _plain_rollout(rollout: Rollout) -> dict[str, Any]:
    """All but the arrays; of some of them the sizes. JSON carries a float as the shortest decimal that is read back as
    the same float."""
    return {
        "rollout_id": rollout.rollout_id,
        "num_prompt_tokens": int(rollout.num_prompt_tokens),
        "completion": rollout.completion,
        "stop_reason": rollout.stop_reason.value,
        "engine": rollout.engine,
        "seconds": float(rollout.seconds),
        "reward": None if rollout.reward is None else float(rollout.reward),
        "reward_parts": _numbers(rollout.reward_parts),
        "shaped_by": float(rollout.shaped_by),
        "turn_rewards": None if rollout.turn_rewards is None else [float(reward) for reward in rollout.turn_rewards],
        "token_rewards": None if rollout.token_rewards is None else len(rollout.token_rewards),
        "teacher": None if rollout.teacher is None else list(rollout.teacher.candidate_ids_TK.shape),
    }


def _rollout(plain: Mapping[str, Any], tokens: Mapping[str, NDArray[Any]], some: _Flat) -> Rollout:
    num_rewards, teacher, turn_rewards = plain["token_rewards"], plain["teacher"], plain["turn_rewards"]
    return Rollout(
        **{
            **plain,
            **tokens,
            "stop_reason": StopReason(plain["stop_reason"]),
            "turn_rewards": None if turn_rewards is None else tuple(turn_rewards),
            "token_rewards": None if num_rewards is None else tuple(some.cut("token_rewards", num_rewards).tolist()),
            "teacher": None if teacher is None else _teacher(teacher, some),
        }
    )


def _teacher(shape_TK: Sequence[int], some: _Flat) -> TeacherScores:
    return TeacherScores(
        logprobs_T=some.cut("teacher_logprobs", shape_TK[0]),
        candidate_ids_TK=some.cut("candidate_ids", *shape_TK),
        candidate_logprobs_TK=some.cut("candidate_logprobs", *shape_TK),
    )


def _numbers(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in parts.items()}
