"""KL_ESTIMATORS: the divergence of the policy from a reference, token by token, from sampled tokens.

Names and formulas of http://joschu.net/blog/kl-approx.html: with d = log(policy / reference) of a token that the policy
sampled, each estimates KL(policy || reference). Arguments of every row: policy_logprobs_T float [T] with gradient,
ref_logprobs_T float [T] without, mask_T bool [T]. Results are [T], 0 where the mask is False. Legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlsys.algo.ratios import log_ratio
from rlsys.algo.rows import Need, RowFacts, row, table

MAX_K3 = 10.0  # verl's bound on one token's k3

Estimator = Callable[..., Tensor]


def _difference(policy_logprobs_T: Tensor, ref_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    assert policy_logprobs_T.ndim == 1 and mask_T.dtype == torch.bool, f"{policy_logprobs_T.shape} {mask_T.dtype}"
    assert policy_logprobs_T.shape == ref_logprobs_T.shape == mask_T.shape, "shapes differ"
    return log_ratio(policy_logprobs_T, ref_logprobs_T.detach(), mask_T)


@row(
    RowFacts(
        source="Schulman 2020, http://joschu.net/blog/kl-approx.html",
        needs=(Need.REFERENCE,),
        as_loss=False,
        peers={
            "verl": "kl, k1; use_kl_in_reward, kl_coef 0.001, off by default",
            "OpenRLHF": "k1, its default, in the reward, init_coef 0.01",
            "AReaL": "k1, its default, in the reward, kl_ctl 0.1",
        },
    )
)
def k1(policy_logprobs_T: Tensor, ref_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """d. Made for rewards: in a loss its expected gradient is 0."""
    return _difference(policy_logprobs_T, ref_logprobs_T, mask_T)


@row(
    RowFacts(
        source="Schulman 2020, http://joschu.net/blog/kl-approx.html",
        needs=(Need.REFERENCE,),
        peers={"verl": "mse, k2", "OpenRLHF": "k2", "AReaL": "k2"},
    )
)
def k2(policy_logprobs_T: Tensor, ref_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """d^2 / 2. Biased in value, on-policy its gradient is that of the divergence."""
    return 0.5 * _difference(policy_logprobs_T, ref_logprobs_T, mask_T).square()


@row(
    RowFacts(
        source="Schulman 2020, http://joschu.net/blog/kl-approx.html",
        needs=(Need.REFERENCE,),
        peers={
            "verl": "low_var_kl, k3; kl_loss_coef 0.001, off by default",
            "TRL": "beta, 0 by default",
            "OpenRLHF": "k3",
            "AReaL": "k3",
            "SkyRL": "k3, its default, in the loss, 0.001",
            "NeMo-RL": "k3, its default, in the loss, 0.01",
        },
    )
)
def k3(policy_logprobs_T: Tensor, ref_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """exp(-d) - 1 + d, at most 10. Never negative, little variance; its gradient is that of KL(reference || policy)."""
    difference_T = _difference(policy_logprobs_T, ref_logprobs_T, mask_T)
    return (torch.expm1(-difference_T) + difference_T).clamp(max=MAX_K3)


@row(RowFacts(source="absolute difference, as in verl", needs=(Need.REFERENCE,), peers={"verl": "abs"}))
def abs(policy_logprobs_T: Tensor, ref_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """|d|. A penalty, no divergence."""
    return _difference(policy_logprobs_T, ref_logprobs_T, mask_T).abs()


@row(RowFacts(source="straight-through k3, as in verl", needs=(Need.REFERENCE,), peers={"verl": "low_var_kl+, k3+"}))
def k3_straight(policy_logprobs_T: Tensor, ref_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """The value of ``k3`` with the gradient of ``k2``: little variance, and on-policy the right direction."""
    gradient_T = k2(policy_logprobs_T, ref_logprobs_T, mask_T)
    return k3(policy_logprobs_T, ref_logprobs_T, mask_T).detach() + gradient_T - gradient_T.detach()


@row(
    RowFacts(
        source="unbiased estimate of DeepSeek-V3.2, arXiv:2512.02556",
        needs=(Need.REFERENCE,),
        anchor="behaviour",
        peers={
            "TRL": "use_bias_correction_kl: from the old policy",
            "slime": "use_unbiased_kl",
            "NeMo-RL": "use_on_policy_kl_approximation: its weight passes no gradient",
        },
    )
)
def k3_corrected(
    policy_logprobs_T: Tensor, ref_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor
) -> Tensor:
    """(policy / behaviour) * ``k3``: the estimate for tokens that another policy sampled; gradient through both."""
    weight_T = log_ratio(policy_logprobs_T, behaviour_logprobs_T.detach(), mask_T).exp()
    return weight_T * k3(policy_logprobs_T, ref_logprobs_T, mask_T)


def penalised_rewards(rewards_T: Tensor, divergence_T: Tensor, mask_T: Tensor, *, coef: float) -> Tensor:
    """r_t - coef * divergence_t on weighted tokens, [T]: the divergence in the reward instead of the loss.

    Args:
        divergence_T: of a row above, at the proximal policy.
    """
    assert rewards_T.shape == divergence_T.shape == mask_T.shape, "shapes differ"
    return rewards_T - coef * torch.where(mask_T, divergence_T.detach(), 0.0)


KL_ESTIMATORS = table(k1, k2, k3, abs, k3_straight, k3_corrected)
