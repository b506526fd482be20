"""Scored groups to trainable samples: advantages on tokens, tokens cut for age."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rlsys.records import Rollout, RolloutGroup, Sample, steps_of


def build(
    groups: Sequence[RolloutGroup],
    *,
    advantage: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    oldest_step: int | None,
) -> list[Sample]:
    """The samples of ``groups``, in their order.

    The advantage of a rollout is computed over all rewards of its group, those of dropped members included, and stands
    on each of its weighted tokens. A rollout without a weighted token is no sample.

    Args:
        groups: every rollout scored.
        advantage: row of ADVANTAGES with its parameters bound: (rewards_S, group_starts) to advantages_S.
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
    advantages = advantage(torch.from_numpy(rewards), torch.from_numpy(starts.astype(np.int64))).numpy()

    samples = []
    for group, start in zip(groups, starts, strict=True):
        for index, rollout in enumerate(group.rollouts):
            sample = _sample(rollout, float(advantages[start + index]), oldest_step)
            if sample.weight_mask_T.any():
                samples.append(sample)
    return samples


def _sample(rollout: Rollout, advantage: float, oldest_step: int | None) -> Sample:
    weight_mask_T = rollout.loss_mask_T
    if oldest_step is not None:
        weight_mask_T = weight_mask_T & (steps_of(rollout.versions_T) >= oldest_step)
    return Sample(
        rollout_id=rollout.rollout_id,
        token_ids_T=rollout.token_ids_T,
        weight_mask_T=weight_mask_T,
        behaviour_logprobs_T=rollout.behaviour_logprobs_T,
        advantages_T=np.where(weight_mask_T, np.float32(advantage), np.float32(0.0)),
        versions_T=rollout.versions_T,
    )
