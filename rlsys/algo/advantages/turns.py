"""Advantages of turns: what a turn earned, compared with like turns of the group.

Legend: U turns of all rollouts in one row, S rollouts, G groups, H sets of like turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.advantages.group import grpo
from rlsys.algo.rows import Need, RowFacts, Scope, row
from rlsys.algo.segments import Segments


def _relative_to_like_turns(
    values_U: Tensor,
    turn_keys_U: Tensor,
    turn_rollouts_U: Tensor,
    group_starts_G: Tensor,
    *,
    scale_by_std: bool,
    eps: float,
) -> Tensor:
    """``grpo`` over the turns that share group and key."""
    group_U = torch.searchsorted(group_starts_G, turn_rollouts_U, right=True) - 1
    pairs_U2 = torch.stack([group_U, turn_keys_U], dim=1)
    _, set_U, sizes_H = torch.unique(pairs_U2, dim=0, return_inverse=True, return_counts=True)
    order_U = torch.argsort(set_U, stable=True)
    ordered_U = grpo(values_U[order_U], sizes_H.cumsum(0) - sizes_H, scale_by_std=scale_by_std, eps=eps)
    return torch.empty_like(ordered_U).index_copy(0, order_U, ordered_U)


def _returns(turn_rewards_U: Tensor, turn_keys_U: Tensor, turn_rollouts_U: Tensor, gamma: float) -> Tensor:
    assert turn_rewards_U.ndim == 1 and turn_rewards_U.is_floating_point(), f"turn rewards: {turn_rewards_U.shape}"
    assert turn_rewards_U.shape == turn_keys_U.shape == turn_rollouts_U.shape, "shapes differ"
    assert bool((torch.diff(turn_rollouts_U) >= 0).all()), "turns stand in the order of their rollouts"
    assert 0.0 <= gamma <= 1.0, f"gamma={gamma}"
    counts = torch.unique_consecutive(turn_rollouts_U, return_counts=True)[1]
    return Segments(counts.cumsum(0) - counts, turn_rewards_U.numel()).suffix_sum(turn_rewards_U, gamma)


@row(
    RowFacts(
        source="GRPO by step index, as in PipelineRL, arXiv:2509.19128",
        scope=Scope.SEQUENCE,
        gives="turn",
        needs=(Need.GROUPS, Need.TURNS),
        peers={"PipelineRL": "groups by prompt and step index; baseline without the rollout itself, eps 1e-4"},
    )
)
def turn_grpo(
    turn_rewards_U: Tensor,
    turn_keys_U: Tensor,
    turn_rollouts_U: Tensor,
    group_starts_G: Tensor,
    *,
    gamma: float = 1.0,
    scale_by_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """GRPO of each turn's return (its reward and the discounted rewards of later turns) among like turns of the group.

    Like turns have the same key: the index of the turn, usually. A turn without its like gets 0.

    Args:
        turn_rewards_U: floating [U]; an outcome alone stands on the last turn.
        turn_keys_U, turn_rollouts_U: int64 [U].
        group_starts_G: int64 [G], index in S of the first rollout of each group.
        gamma: discount from turn to turn.

    Returns:
        [U], to be laid on the tokens of each turn.
    """
    returns_U = _returns(turn_rewards_U, turn_keys_U, turn_rollouts_U, gamma)
    return _relative_to_like_turns(
        returns_U, turn_keys_U, turn_rollouts_U, group_starts_G, scale_by_std=scale_by_std, eps=eps
    )


@row(
    RowFacts(
        source="GiGPO, Feng et al. 2025, arXiv:2505.10978",
        scope=Scope.SEQUENCE,
        gives="turn",
        needs=(Need.GROUPS, Need.TURNS),
        peers={"ROLL": "gigpo, step_reinforce"},
    )
)
def gigpo(
    rewards_S: Tensor,
    turn_rewards_U: Tensor,
    turn_states_U: Tensor,
    turn_rollouts_U: Tensor,
    group_starts_G: Tensor,
    *,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    scale_by_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """A = grpo(rewards of the rollouts) + step_weight * ``turn_grpo`` with the state of the environment as key.

    Turns before which the environment said the same are like ones. The rest is as in ``turn_grpo``; ``rewards_S`` are
    the rewards of whole rollouts.
    """
    rollout_S = grpo(rewards_S, group_starts_G, scale_by_std=scale_by_std, eps=eps)
    step_U = turn_grpo(
        turn_rewards_U,
        turn_states_U,
        turn_rollouts_U,
        group_starts_G,
        gamma=gamma,
        scale_by_std=scale_by_std,
        eps=eps,
    )
    return rollout_S[turn_rollouts_U] + step_weight * step_U
