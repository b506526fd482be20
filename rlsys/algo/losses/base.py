"""What every policy loss shares: its result, its checks and the measures of its ratio. Legend: T packed tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.measures import Mean, Measure
from rlsys.algo.ratios import log_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """What a policy loss returns.

    Attributes:
        loss_T: [T], with gradient; 0 where the mask is False.
        measures: its metrics.
    """

    loss_T: Tensor
    measures: Mapping[str, Measure]


def prepared(
    policy_logprobs_T: Tensor, anchor_logprobs_T: Tensor, advantages_T: Tensor, mask_T: Tensor
) -> tuple[Tensor, Tensor]:
    """log(policy / anchor) with gradient into the policy only, and the advantages; both 0 where the mask is False.

    What stands behind the mask is taken out before any arithmetic: NaN times 0 would reach the gradient.
    """
    assert policy_logprobs_T.ndim == 1 and mask_T.dtype == torch.bool, f"{policy_logprobs_T.shape} {mask_T.dtype}"
    for other_T in (anchor_logprobs_T, advantages_T, mask_T):
        assert other_T.shape == policy_logprobs_T.shape, f"{other_T.shape} against {policy_logprobs_T.shape}"
    log_ratio_T = log_ratio(policy_logprobs_T, anchor_logprobs_T.detach(), mask_T)
    return log_ratio_T, torch.where(mask_T, advantages_T.detach(), 0.0)


def score(policy_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """log(policy), 0 where the mask is False."""
    return torch.where(mask_T, policy_logprobs_T, 0.0)


def ratio_measures(
    log_ratio_T: Tensor, mask_T: Tensor, *, clipped_T: Tensor | None = None, clipped_low_T: Tensor | None = None
) -> dict[str, Measure]:
    """``actor/ppo_kl``, and the shares of tokens that the trust region cut (bool [T]), under verl's names."""
    measures: dict[str, Measure] = {"actor/ppo_kl": Mean.of(-log_ratio_T, mask_T)}
    if clipped_T is not None:
        measures["actor/pg_clipfrac"] = Mean.share(clipped_T, mask_T)
    if clipped_low_T is not None:
        measures["actor/pg_clipfrac_lower"] = Mean.share(clipped_low_T, mask_T)
    return measures


def clipped_loss(log_ratio_T: Tensor, advantages_T: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)) and where the clip acts (bool), both [T]."""
    assert 0.0 <= eps_low <= 1.0 and eps_high >= 0.0, f"eps_low={eps_low}, eps_high={eps_high}"
    ratio_T = log_ratio_T.exp()
    clipped_T = is_clipped(ratio_T, advantages_T, eps_low, eps_high)
    return -advantages_T * held(ratio_T, clipped_T, eps_low, eps_high), clipped_T


def is_clipped(ratio_T: Tensor, advantages_T: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """Where -A clip(r) is above -A r, bool [T]: beyond the band, on the side that A pushes to."""
    ratio_T = ratio_T.detach()
    return ((ratio_T > 1.0 + eps_high) & (advantages_T > 0.0)) | ((ratio_T < 1.0 - eps_low) & (advantages_T < 0.0))


def held(ratio_T: Tensor, clipped_T: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """r, and where the clip acts the bound that it is held at, without gradient.

    Times -A this is max(-A r, -A clip(r)), and autograd keeps less for it.
    """
    return torch.where(clipped_T, ratio_T.detach().clamp(1.0 - eps_low, 1.0 + eps_high), ratio_T)
