"""Policy losses, per token. They return losses, never means: the caller divides once by the global count.

Legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.measures import Mean, Measure

MAX_LOG_RATIO = 20.0  # exp() of more makes float32 products with an advantage useless, and soon infinite


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """What a policy loss returns.

    Attributes:
        loss_T: [T], with gradient; 0 where the mask is False.
        measures: its metrics.
    """

    loss_T: Tensor
    measures: Mapping[str, Measure]


def log_ratio(numerator_logprobs_T: Tensor, denominator_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """log(numerator / denominator), within +-MAX_LOG_RATIO; 0 where the mask is False. All [T]."""
    difference_T = torch.where(mask_T, numerator_logprobs_T - denominator_logprobs_T, 0.0)
    return difference_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ppo_clip(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> TokenLosses:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)) with r = policy / anchor.

    From PPO (arXiv 1707.06347); unequal bounds as in DAPO (arXiv 2503.14476).

    Args:
        policy_logprobs_T: float [T], with gradient.
        anchor_logprobs_T: float [T], centre of the trust region, no gradient flows into it.
        advantages_T: float [T].
        mask_T: bool [T], tokens that carry weight.
    """
    _check(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    assert 0.0 <= eps_low <= 1.0 and eps_high >= 0.0, f"eps_low={eps_low}, eps_high={eps_high}"
    log_ratio_T = log_ratio(policy_logprobs_T, anchor_logprobs_T.detach(), mask_T)
    ratio_T = log_ratio_T.exp()
    advantages_T = torch.where(mask_T, advantages_T, 0.0)
    free_T = -advantages_T * ratio_T
    bounded_T = -advantages_T * ratio_T.clamp(1.0 - eps_low, 1.0 + eps_high)
    return TokenLosses(
        loss_T=torch.maximum(free_T, bounded_T),
        measures={
            "actor/pg_clipfrac": Mean.of((bounded_T > free_T).to(ratio_T.dtype), mask_T),
            "actor/ppo_kl": Mean.of(-log_ratio_T, mask_T),
        },
    )


def reinforce(
    policy_logprobs_T: Tensor, anchor_logprobs_T: Tensor, advantages_T: Tensor, mask_T: Tensor
) -> TokenLosses:
    """-A log(policy) (Williams 1992). The anchor is only measured against; arguments as in ``ppo_clip``."""
    _check(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    log_ratio_T = log_ratio(policy_logprobs_T, anchor_logprobs_T.detach(), mask_T)
    advantages_T = torch.where(mask_T, advantages_T, 0.0)  # else NaN x 0 would reach the gradient
    return TokenLosses(
        loss_T=torch.where(mask_T, -advantages_T * policy_logprobs_T, 0.0),
        measures={"actor/ppo_kl": Mean.of(-log_ratio_T, mask_T)},
    )


def _check(policy_logprobs_T: Tensor, anchor_logprobs_T: Tensor, advantages_T: Tensor, mask_T: Tensor) -> None:
    assert policy_logprobs_T.ndim == 1 and mask_T.dtype == torch.bool, f"{policy_logprobs_T.shape} {mask_T.dtype}"
    for other_T in (anchor_logprobs_T, advantages_T, mask_T):
        assert other_T.shape == policy_logprobs_T.shape, f"{other_T.shape} against {policy_logprobs_T.shape}"


POLICY_LOSSES: dict[str, Callable[..., TokenLosses]] = {"ppo_clip": ppo_clip, "reinforce": reinforce}
