"""Scored groups to trainable samples: advantages on tokens, tokens cut for age."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.algo.rows import call_whole
from rlsys.records import Rollout, RolloutGroup, Sample, steps_of


def build(
    groups: Sequence[RolloutGroup],
    *,
    advantage: Callable[..., torch.Tensor],
    oldest_step: int | None,
) -> list[Sample]:
    """The samples of ``groups``, in their order.

    The advantage of a rollout is computed over all rewards of its group, those of dropped members included, and stands
    on each of its weighted tokens. A rollout without a weighted token is no sample.

    Args:
        groups: every rollout scored.
        advantage: row of ADVANTAGES with its parameters bound, one that gives a number for each rollout from rewards_S,
            group_starts_G and lengths_S. A row of batch scope sees all ``groups``.
        oldest_step: tokens sampled by an older step lose their weight; None cuts nothing.

    Raises:
        ValueError: a rollout has no reward.
    """
    for group in groups:
        unscored = [rollout.rollout_id for rollout in group.rollouts if rollout.reward is None]
        if unscored:
            raise ValueError(f"rollouts without a reward cannot be trained: {unscored}")
    groups = [group for group in groups if group.rollouts]
    if not groups:
        return []
    sizes = np.array([len(group.baseline_rewards) for group in groups])
    starts = np.cumsum(sizes) - sizes
    rewards = np.concatenate([np.asarray(group.baseline_rewards, dtype=np.float64) for group in groups])
    standing = [
        (start + index, rollout, _weight_mask(rollout, oldest_step))
        for group, start in zip(groups, starts, strict=True)
        for index, rollout in enumerate(group.rollouts)
    ]
    lengths = np.zeros(len(rewards))  # 0 for a reward whose rollout is gone
    for place, _, weight_mask_T in standing:
        lengths[place] = np.count_nonzero(weight_mask_T)
    inputs = {
        "rewards_S": torch.from_numpy(rewards),
        "group_starts_G": torch.from_numpy(starts.astype(np.int64)),
        "lengths_S": torch.from_numpy(lengths),
    }
    advantages = call_whole(advantage, inputs).numpy()
    return [
        _sample(rollout, float(advantages[place]), weight_mask_T)
        for place, rollout, weight_mask_T in standing
        if weight_mask_T.any()
    ]


def _weight_mask(rollout: Rollout, oldest_step: int | None) -> NDArray[np.bool_]:
    if oldest_step is None:
        return rollout.loss_mask_T
    return rollout.loss_mask_T & (steps_of(rollout.versions_T) >= oldest_step)


def _sample(rollout: Rollout, advantage: float, weight_mask_T: NDArray[np.bool_]) -> Sample:
    return Sample(
        rollout_id=rollout.rollout_id,
        token_ids_T=rollout.token_ids_T,
        weight_mask_T=weight_mask_T,
        behaviour_logprobs_T=rollout.behaviour_logprobs_T,
        advantages_T=np.where(weight_mask_T, np.float32(advantage), np.float32(0.0)),
        versions_T=rollout.versions_T,
    )
