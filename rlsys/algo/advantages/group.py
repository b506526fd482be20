"""Advantages of rollouts relative to their group: one number for each rollout.

A group whose rewards are all equal gets exactly 0, and so does a group of one: no noise of rounding is blown up by
1 / eps, and a reward without anything to compare it with teaches nothing. Legend: S rewards of all groups in one row,
G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.rows import Need, RowFacts, Scope, row
from rlsys.algo.segments import Segments


def groups_of(rewards_S: Tensor, group_starts_G: Tensor) -> Segments:
    """The groups as segments of the rewards; checks both."""
    assert rewards_S.ndim == 1 and rewards_S.is_floating_point(), f"rewards: {rewards_S.shape} {rewards_S.dtype}"
    return Segments(group_starts_G, rewards_S.numel())


def centred(rewards_S: Tensor, groups: Segments) -> Tensor:
    """r - mean of the group, float64 [S]; exactly 0 where all rewards of the group are equal."""
    values_S = rewards_S.double()
    everywhere_S = torch.ones_like(values_S, dtype=torch.bool)
    highest_G, lowest_G = groups.max(values_S, everywhere_S), -groups.max(-values_S, everywhere_S)
    difference_S = values_S - groups.spread(groups.mean(values_S, everywhere_S))
    return torch.where(groups.spread(highest_G == lowest_G), 0.0, difference_S)


def group_std(centred_S: Tensor, groups: Segments, *, unbiased: bool) -> Tensor:
    """Standard deviation of each rollout's group, float64 [S]; 0 for a group of one."""
    freedom_G = groups.lengths_S - 1 if unbiased else groups.lengths_S
    return groups.spread((groups.sum(centred_S.square()) / freedom_G.clamp(min=1)).sqrt())


def scaled(centred_S: Tensor, scale_S: Tensor) -> Tensor:
    """centred / scale; 0 where the scale is 0, which is where the group has nothing to tell."""
    return torch.where(scale_S == 0.0, 0.0, centred_S / torch.where(scale_S == 0.0, 1.0, scale_S))


@row(
    RowFacts(
        source="DeepSeekMath, Shao et al. 2024, arXiv:2402.03300",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={
            "verl": "grpo, eps 1e-6; a group of one keeps its reward",
            "TRL": 'scale_rewards="group", eps 1e-4; its asynchronous trainer: population std, eps 1e-8',
            "OpenRLHF": "group_norm, eps 1e-9",
            "AReaL": "reward_norm over the group",
            "SkyRL": "grpo, eps 1e-6",
            "slime": "grpo, eps 1e-6",
            "NeMo-RL": "grpo, eps 1e-6, only where the std is above 0",
        },
    )
)
def grpo(
    rewards_S: Tensor,
    group_starts_G: Tensor,
    *,
    scale_by_std: bool = True,
    eps: float = 1e-6,
    unbiased: bool = True,
) -> Tensor:
    """A = (r - mean of the group) / (std of the group + eps).

    Args:
        rewards_S: floating, [S], the groups one after another.
        group_starts_G: int64, [G], ascending, index of the first reward of each group; the first is 0.
        scale_by_std: False leaves the division out (``dr_grpo``).
        eps: added to the standard deviation.
        unbiased: the standard deviation divides by n - 1, not by n.

    Returns:
        [S], the dtype of ``rewards_S``.
    """
    groups = groups_of(rewards_S, group_starts_G)
    advantages_S = centred(rewards_S, groups)
    if scale_by_std:
        advantages_S = scaled(advantages_S, group_std(advantages_S, groups, unbiased=unbiased) + eps)
    return advantages_S.to(rewards_S.dtype)


@row(
    RowFacts(
        source="Dr. GRPO, Liu et al. 2025, arXiv:2503.20783",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={
            "verl": "grpo with norm_adv_by_std_in_grpo=False",
            "TRL": 'scale_rewards="none"',
            "OpenRLHF": "dr_grpo",
            "SkyRL": "grpo_norm_by_std=False",
            "prime-rl": "grpo",
        },
    )
)
def dr_grpo(rewards_S: Tensor, group_starts_G: Tensor) -> Tensor:
    """A = r - mean of the group. The paper divides the loss by a constant too: ``seq_mean_token_sum_norm``."""
    return centred(rewards_S, groups_of(rewards_S, group_starts_G)).to(rewards_S.dtype)


@row(
    RowFacts(
        source="RLOO, Ahmadian et al. 2024, arXiv:2402.14740",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={
            "verl": "rloo (a group of one keeps its reward), rloo_vectorized (a group of one gets 0)",
            "OpenRLHF": "rloo",
            "TRL": "RLOOTrainer",
            "SkyRL": "rloo",
            "Trinity": "rloo",
        },
    )
)
def rloo(rewards_S: Tensor, group_starts_G: Tensor) -> Tensor:
    """A = r - mean of the others of the group = n / (n - 1) (r - mean of the group)."""
    groups = groups_of(rewards_S, group_starts_G)
    scale_G = groups.lengths_S / (groups.lengths_S - 1).clamp(min=1)
    return (groups.spread(scale_G) * centred(rewards_S, groups)).to(rewards_S.dtype)


@row(
    RowFacts(
        source="PipelineRL, arXiv:2509.19128, and its code",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={
            "PipelineRL": "its default, eps 1e-4",
            "NeMo-RL": "use_leave_one_out_baseline=True: its std leaves the rollout out too",
        },
    )
)
def grpo_loo(rewards_S: Tensor, group_starts_G: Tensor, *, eps: float = 1e-4) -> Tensor:
    """A = (r - mean of the others of the group) / (unbiased std of the group + eps)."""
    groups = groups_of(rewards_S, group_starts_G)
    std_S = group_std(centred(rewards_S, groups), groups, unbiased=True)
    return scaled(rloo(rewards_S.double(), group_starts_G), std_S + eps).to(rewards_S.dtype)


@row(
    RowFacts(
        source="maximum-likelihood RL, as in the code of SkyRL and prime-rl",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={"SkyRL": "maxrl", "prime-rl": "max_rl"},
    )
)
def maxrl(rewards_S: Tensor, group_starts_G: Tensor, *, eps: float = 1e-6) -> Tensor:
    """A = (r - mean of the group) / (mean of the group + eps). For rewards of 0 and 1: a rare success weighs more."""
    groups = groups_of(rewards_S, group_starts_G)
    everywhere_S = torch.ones_like(rewards_S, dtype=torch.bool)
    mean_S = groups.spread(groups.mean(rewards_S.double(), everywhere_S))
    return scaled(centred(rewards_S, groups), mean_S + eps).to(rewards_S.dtype)


@row(
    RowFacts(
        source="Pass@k policy gradient, Tang et al. 2025, arXiv:2503.19595",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={"verl": "grpo_passk, eps 1e-6; refuses a group of one"},
    )
)
def grpo_passk(rewards_S: Tensor, group_starts_G: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Only the best rollout of a group learns: A = (best - second best) / (unbiased std + eps), all others get 0.

    Two that share the best reward leave nothing to learn. ``scale_by_std=False`` leaves the division out.
    """
    groups = groups_of(rewards_S, group_starts_G)
    values_S = rewards_S.double()
    everywhere_S = torch.ones_like(values_S, dtype=torch.bool)
    best_G = groups.max(values_S, everywhere_S)
    is_best_S = values_S == groups.spread(best_G)
    second_G = groups.max(values_S, ~is_best_S)
    is_alone_G = (groups.count(is_best_S) == 1) & second_G.isfinite()
    advantages_S = torch.where(is_best_S & groups.spread(is_alone_G), groups.spread(best_G - second_G), 0.0)
    if scale_by_std:
        advantages_S = scaled(advantages_S, group_std(centred(rewards_S, groups), groups, unbiased=True) + eps)
    return advantages_S.to(rewards_S.dtype)


@row(
    RowFacts(
        source="OPO, Hao et al. 2025, arXiv:2505.23585",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={"verl": "opo; a group of one keeps its reward"},
    )
)
def opo(rewards_S: Tensor, group_starts_G: Tensor, lengths_S: Tensor) -> Tensor:
    """A = r - sum(length * r) / sum(length) over the group: the baseline of least variance, by lengths.

    A rollout of length 0 (in the baseline only) does not move the baseline. A group without any length gets 0.
    """
    groups = groups_of(rewards_S, group_starts_G)
    assert lengths_S.shape == rewards_S.shape and bool((lengths_S >= 0).all()), f"lengths: {lengths_S.shape}"
    difference_S, lengths_S = centred(rewards_S, groups), lengths_S.double()
    total_G = groups.sum(lengths_S)
    shift_G = groups.sum(lengths_S * difference_S) / total_G.clamp(min=1.0)  # the baseline, from the group's mean
    is_standing_S = groups.spread(total_G > 0)
    return torch.where(is_standing_S, difference_S - groups.spread(shift_G), 0.0).to(rewards_S.dtype)
