"""Groups as arrays and plain JSON, and back: how finished rollouts outlive the process that holds them.

Legend: S rollouts of all groups together, N tokens of all rollouts one after another, T tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.errors import CheckpointDamaged
from rlsys.records import DropCause, DroppedRollout, Prompt, Rollout, RolloutGroup, StopReason

Arrays = dict[str, NDArray[Any]]
PromptOf = Callable[[int, int, int], Prompt]  # index, epoch, attempt of a draw

_TYPES = {
    "token_ids_T": np.dtype(np.int32),
    "loss_mask_T": np.dtype(np.bool_),
    "behaviour_logprobs_T": np.dtype(np.float32),
    "versions_T": np.dtype(np.int64),
}


def groups_to_arrays(groups: Sequence[RolloutGroup]) -> tuple[Arrays, dict[str, Any]]:
    """Everything per token as four arrays [N], with the lengths [S] that cut them; the rest as plain JSON.

    A prompt is saved as index, epoch and attempt of its draw: the source can ask it again.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    arrays: Arrays = {
        name: np.concatenate([np.zeros(0, dtype), *(getattr(rollout, name) for rollout in rollouts)], dtype=dtype)
        for name, dtype in _TYPES.items()
    }
    arrays["lengths_S"] = np.array([len(rollout.token_ids_T) for rollout in rollouts], dtype=np.int64)
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
    return tuple(
        RolloutGroup(
            prompt=prompt_of(*group["draw"]),
            rollouts=tuple(
                _rollout(rollout, {name: next(part) for name, part in parts.items()}) for rollout in group["rollouts"]
            ),
            dropped=tuple(
                DroppedRollout(rollout_id=rollout_id, cause=DropCause(cause), detail=detail)
                for rollout_id, cause, detail in group["dropped"]
            ),
            dropped_rewards=tuple(group["dropped_rewards"]),
        )
        for group in plain["groups"]
    )


def _plain_group(group: RolloutGroup) -> dict[str, Any]:
    draw = group.prompt.draw
    return {
        "draw": [draw.index, draw.epoch, group.prompt.attempt],
        "rollouts": [_plain_rollout(rollout) for rollout in group.rollouts],
        "dropped": [[lost.rollout_id, lost.cause.value, lost.detail] for lost in group.dropped],
        "dropped_rewards": [float(reward) for reward in group.dropped_rewards],
    }


def _plain_rollout(rollout: Rollout) -> dict[str, Any]:
    """All but the tokens. JSON carries a float as the shortest decimal that is read back as the same float."""
    return {
        "rollout_id": rollout.rollout_id,
        "num_prompt_tokens": int(rollout.num_prompt_tokens),
        "completion": rollout.completion,
        "stop_reason": rollout.stop_reason.value,
        "engine": rollout.engine,
        "seconds": float(rollout.seconds),
        "reward": None if rollout.reward is None else float(rollout.reward),
        "reward_parts": {name: float(value) for name, value in rollout.reward_parts.items()},
    }


def _rollout(plain: Mapping[str, Any], tokens: Mapping[str, NDArray[Any]]) -> Rollout:
    return Rollout(**{**plain, **tokens, "stop_reason": StopReason(plain["stop_reason"])})
