"""Scored groups to trainable samples: advantages, rewards on tokens, tokens cut for age.

Legend: S rewards of all groups in one row, G groups, U turns of all rollouts in one row, T tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.algo.rows import call_whole, facts_of, inputs_of
from rlsys.errors import ConfigError
from rlsys.records import NOT_SAMPLED, Rollout, RolloutGroup, Sample, steps_of


def build(
    groups: Sequence[RolloutGroup],
    *,
    advantage: Callable[..., Any],
    oldest_step: int | None,
    correct_at: float,
) -> list[Sample]:
    """The samples of ``groups``, in their order.

    An advantage of a rollout, or of a turn, is computed over all rewards of its group, those of dropped members
    included, and stands on each of its weighted tokens. Advantages that a row gives by token are left to the learner
    (they may need a critic, or the divergence from a reference). A rollout without a weighted token is no sample.

    Args:
        groups: every rollout scored.
        advantage: row of ADVANTAGES with its parameters bound. A row of batch scope sees all ``groups``.
        oldest_step: tokens sampled by an older step lose their weight; None cuts nothing.
        correct_at: score from which an answer is right.

    Raises:
        ValueError: a rollout has no reward.
        ConfigError: the rewards have not all the parts that the row compares.
    """
    for group in groups:
        unscored = [rollout.rollout_id for rollout in group.rollouts if rollout.reward is None]
        if unscored:
            raise ValueError(f"rollouts without a reward cannot be trained: {unscored}")
    groups = [group for group in groups if group.rollouts]
    if not groups:
        return []
    standing = _standing(groups, oldest_step)
    advantages = _advantages(groups, standing, advantage)
    return [
        _sample(member, advantages_T, correct_at)
        for member, advantages_T in zip(standing, advantages, strict=True)
        if member.weight_mask_T.any()
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """A rollout that stands, and the place of its reward among all rewards."""

    place: int
    rollout: Rollout
    weight_mask_T: NDArray[np.bool_]
    greedy_reward: float


def _standing(groups: Sequence[RolloutGroup], oldest_step: int | None) -> list[_Member]:
    sizes = np.array([len(group.baseline_rewards) for group in groups])
    starts = np.cumsum(sizes) - sizes
    return [
        _Member(
            place=int(start) + index,
            rollout=rollout,
            weight_mask_T=_weight_mask(rollout, oldest_step),
            greedy_reward=group.greedy_reward or 0.0,
        )
        for group, start in zip(groups, starts, strict=True)
        for index, rollout in enumerate(group.rollouts)
    ]


def _advantages(
    groups: Sequence[RolloutGroup], standing: Sequence[_Member], advantage: Callable[..., Any]
) -> list[NDArray[np.float32]]:
    """Of each member, [T]."""
    gives = facts_of(advantage).gives
    if gives == "token":
        return [np.zeros(len(member.rollout.token_ids_T), dtype=np.float32) for member in standing]
    inputs = _group_inputs(groups, standing, asked=inputs_of(advantage))
    values = call_whole(advantage, inputs).numpy()
    if gives == "rollout":
        return [_on_tokens(member, np.float32(values[member.place])) for member in standing]
    ends = np.cumsum([len(member.rollout.turn_ends) for member in standing])
    return [
        _on_tokens(member, _turn_of_token(member.rollout, of_turns))
        for member, of_turns in zip(standing, np.split(values.astype(np.float32), ends[:-1]), strict=True)
    ]


def _group_inputs(
    groups: Sequence[RolloutGroup], standing: Sequence[_Member], asked: Sequence[str]
) -> dict[str, torch.Tensor]:
    sizes = np.array([len(group.baseline_rewards) for group in groups])
    rewards = np.concatenate([np.asarray(group.baseline_rewards, dtype=np.float64) for group in groups])
    lengths = np.zeros(len(rewards))  # 0 for a reward whose rollout is gone
    for member in standing:
        lengths[member.place] = np.count_nonzero(member.weight_mask_T)
    inputs = {
        "rewards_S": torch.from_numpy(rewards),
        "group_starts_G": torch.from_numpy((np.cumsum(sizes) - sizes).astype(np.int64)),
        "lengths_S": torch.from_numpy(lengths),
    }
    if "reward_parts_SK" in asked:
        inputs["reward_parts_SK"] = _reward_parts(groups)
    if "turn_rewards_U" in asked:
        rollouts = [member.rollout for member in standing]
        keys = [turn for rollout in rollouts for turn in range(len(rollout.turn_ends))]
        places = [member.place for member in standing for _ in member.rollout.turn_ends]
        inputs |= {
            "turn_rewards_U": torch.from_numpy(np.concatenate([_turn_rewards(rollout) for rollout in rollouts])),
            "turn_keys_U": torch.tensor(keys),
            "turn_states_U": torch.tensor([state for rollout in rollouts for state in _states(rollout)]),
            "turn_rollouts_U": torch.tensor(places),
        }
    return inputs


def _reward_parts(groups: Sequence[RolloutGroup]) -> torch.Tensor:
    """[S, K], the parts in the order of their names."""
    parts: list[Mapping[str, float]] = []
    for group in groups:
        parts += [rollout.reward_parts for rollout in group.rollouts] + list(group.dropped_parts)
    names = sorted(parts[0])
    for of_rollout in parts:
        if sorted(of_rollout) != names or not names:
            raise ConfigError(
                "algo.advantage: it compares the parts of rewards",
                got=f"a reward with the parts {', '.join(names) or 'none'}, and one with "
                f"{', '.join(sorted(of_rollout)) or 'none'}",
                wanted="the same parts in every reward",
                remedy="return RewardResult(reward, parts) from the reward function, or choose another advantage",
            )
    return torch.tensor([[of_rollout[name] for name in names] for of_rollout in parts], dtype=torch.float64)


def _turn_rewards(rollout: Rollout) -> NDArray[np.float64]:
    """What each turn earned: the whole reward on the last one where turns have none of their own."""
    assert rollout.reward is not None
    rewards = np.zeros(len(rollout.turn_ends))
    if rollout.turn_rewards is not None:
        rewards += rollout.turn_rewards
        rewards[-1] += rollout.shaped_by
    else:
        rewards[-1] = rollout.reward
    return rewards


def _rewards_on_tokens(rollout: Rollout) -> NDArray[np.float32]:
    """[T]: on each sampled token where tokens have rewards of their own, else at the end of each turn."""
    rewards_T = np.zeros(len(rollout.token_ids_T), dtype=np.float32)
    if rollout.token_rewards is not None:
        rewards_T[rollout.versions_T != NOT_SAMPLED] = rollout.token_rewards
        rewards_T[rollout.turn_ends[-1]] += rollout.shaped_by
    else:
        rewards_T[rollout.turn_ends] = _turn_rewards(rollout)
    return rewards_T


def _states(rollout: Rollout) -> list[int]:
    """A key of the tokens that stand before each turn, since the turn before it: what the environment said."""
    sampled_T = rollout.versions_T != NOT_SAMPLED
    starts = np.flatnonzero(sampled_T & ~np.append(False, sampled_T[:-1]))
    befores = [0, *(rollout.turn_ends[:-1] + 1)]
    return [_key(rollout.token_ids_T[before:start]) for before, start in zip(befores, starts, strict=True)]


def _key(token_ids_T: NDArray[np.int32]) -> int:
    return int.from_bytes(blake2b(token_ids_T.tobytes(), digest_size=8).digest()) >> 1


def _turn_of_token(rollout: Rollout, of_turns: NDArray[np.float32]) -> NDArray[np.float32]:
    """[U] of one rollout to [T]: tokens behind the last turn take its value, and carry no weight."""
    bounds = [0, *(rollout.turn_ends[:-1] + 1), len(rollout.token_ids_T)]
    return np.repeat(of_turns, [end - start for start, end in pairwise(bounds)])


def _on_tokens(member: _Member, values: Any) -> NDArray[np.float32]:
    return np.where(member.weight_mask_T, values, np.float32(0.0))


def _weight_mask(rollout: Rollout, oldest_step: int | None) -> NDArray[np.bool_]:
    if oldest_step is None:
        return rollout.loss_mask_T
    return rollout.loss_mask_T & (steps_of(rollout.versions_T) >= oldest_step)


def _sample(member: _Member, advantages_T: NDArray[np.float32], correct_at: float) -> Sample:
    rollout = member.rollout
    assert rollout.reward is not None
    return Sample(
        rollout_id=rollout.rollout_id,
        token_ids_T=rollout.token_ids_T,
        weight_mask_T=member.weight_mask_T,
        behaviour_logprobs_T=rollout.behaviour_logprobs_T,
        advantages_T=advantages_T,
        versions_T=rollout.versions_T,
        rewards_T=_rewards_on_tokens(rollout),
        greedy_reward=member.greedy_reward,
        is_correct=rollout.reward - rollout.shaped_by >= correct_at,
        teacher=rollout.teacher,
    )
