"""Advantages of rollouts that look at the whole batch: a standard deviation, a share of successes, a whitening.

Legend: S rewards of all groups in one row, G groups, K parts of a reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.advantages.group import centred, groups_of, grpo, scaled
from rlsys.algo.prepass import Prepass, Settled, Statistics, moments, settle_moments, whiten
from rlsys.algo.rows import Need, RowFacts, Scope, row


def _collect_rewards(rewards_S: Tensor) -> Statistics:
    return moments(rewards_S, torch.ones_like(rewards_S))


@row(
    RowFacts(
        source="Lite PPO, Liu et al. 2025, arXiv:2508.08221",
        scope=Scope.BATCH,
        needs=(Need.GROUPS,),
        peers={"TRL": 'scale_rewards="batch", eps 1e-4', "ROLL": "norm_mean_type=group, norm_std_type=batch"},
        prepass=Prepass(collect=_collect_rewards, settle=settle_moments),
    )
)
def lite_ppo(rewards_S: Tensor, group_starts_G: Tensor, settled: Settled, *, eps: float = 1e-4) -> Tensor:
    """A = (r - mean of the group) / (unbiased std of all rewards of the batch + eps)."""
    difference_S = centred(rewards_S, groups_of(rewards_S, group_starts_G))
    return scaled(difference_S, settled["variance"].sqrt() + eps).to(rewards_S.dtype)


def _collect_nonzero(rewards_S: Tensor) -> Statistics:
    return Statistics(sums={"rollouts": torch.stack([torch.ones_like(rewards_S).sum(), (rewards_S != 0).sum()])})


def _settle_nonzero(statistics: Statistics) -> Settled:
    rollouts, nonzero = statistics.sums["rollouts"].double().unbind()
    return {"alpha": rollouts / nonzero.clamp(min=1.0)}


@row(
    RowFacts(
        source="GPG, Chu et al. 2025, arXiv:2504.02546",
        scope=Scope.BATCH,
        needs=(Need.GROUPS,),
        peers={"verl": "gpg, f_norm 1.0; a group of one keeps its reward"},
        prepass=Prepass(collect=_collect_nonzero, settle=_settle_nonzero),
    )
)
def gpg(rewards_S: Tensor, group_starts_G: Tensor, settled: Settled, *, f_norm: float = 1.0) -> Tensor:
    """A = alpha (r - mean of the group) / f_norm, alpha = rollouts of the batch / those with a reward other than 0.

    Its loss is ``reinforce``.
    """
    assert f_norm > 0.0, f"f_norm={f_norm}"
    difference_S = centred(rewards_S, groups_of(rewards_S, group_starts_G))
    return (settled["alpha"] * difference_S / f_norm).to(rewards_S.dtype)


def _collect_centred(rewards_S: Tensor, group_starts_G: Tensor, lengths_S: Tensor) -> Statistics:
    return moments(centred(rewards_S, groups_of(rewards_S, group_starts_G)), lengths_S)


@row(
    RowFacts(
        source="REINFORCE++, Hu et al. 2025, arXiv:2501.03262, its variant with a group baseline",
        scope=Scope.BATCH,
        needs=(Need.GROUPS,),
        peers={
            "verl": "reinforce_plus_plus_baseline",
            "OpenRLHF": "reinforce_baseline",
            "slime": "reinforce_plus_plus_baseline",
            "NeMo-RL": "its REINFORCE++ estimator",
        },
        prepass=Prepass(collect=_collect_centred, settle=settle_moments),
    )
)
def reinforce_pp_baseline(rewards_S: Tensor, group_starts_G: Tensor, lengths_S: Tensor, settled: Settled) -> Tensor:
    """A = whiten(r - mean of the group) over the weighted tokens of the batch: each rollout counts by its length."""
    assert lengths_S.shape == rewards_S.shape, f"lengths: {lengths_S.shape}"
    return whiten(centred(rewards_S, groups_of(rewards_S, group_starts_G)), settled).to(rewards_S.dtype)


def _weighted_parts(
    reward_parts_SK: Tensor, group_starts_G: Tensor, weights: tuple[float, ...] | None, eps: float
) -> Tensor:
    assert reward_parts_SK.ndim == 2, f"reward parts: {reward_parts_SK.shape}"
    parts = reward_parts_SK.double().unbind(dim=1)
    chosen = (1.0,) * len(parts) if weights is None else weights
    assert len(chosen) == len(parts), f"{len(chosen)} weights for {len(parts)} parts of the reward"
    terms = [weight * grpo(part_S, group_starts_G, eps=eps) for weight, part_S in zip(chosen, parts, strict=True)]
    return torch.stack(terms).sum(dim=0)


def _collect_parts(
    reward_parts_SK: Tensor,
    group_starts_G: Tensor,
    lengths_S: Tensor,
    *,
    weights: tuple[float, ...] | None = None,
    eps: float = 1e-6,
) -> Statistics:
    return moments(_weighted_parts(reward_parts_SK, group_starts_G, weights, eps), lengths_S)


@row(
    RowFacts(
        source="GDPO, Liu et al. 2026, arXiv:2601.05242",
        scope=Scope.BATCH,
        needs=(Need.GROUPS, Need.REWARD_PARTS),
        peers={
            "verl": "gdpo, gdpo_reward_keys, gdpo_reward_weights",
            "TRL": 'multi_objective_aggregation="normalize_then_sum": whitens over rollouts, not over tokens',
            "NeMo-RL": "gdpo",
        },
        prepass=Prepass(collect=_collect_parts, settle=settle_moments),
    )
)
def gdpo(
    reward_parts_SK: Tensor,
    group_starts_G: Tensor,
    lengths_S: Tensor,
    settled: Settled,
    *,
    weights: tuple[float, ...] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """A = whiten(sum over k of weight_k * grpo(part k)) over the weighted tokens of the batch.

    Args:
        weights: one for each part of the reward; None means 1 each.
        eps: added to the group's standard deviation of each part.
    """
    assert lengths_S.shape == reward_parts_SK.shape[:1], f"lengths: {lengths_S.shape}"
    combined_S = _weighted_parts(reward_parts_SK, group_starts_G, weights, eps)
    return whiten(combined_S, settled).to(reward_parts_SK.dtype)
