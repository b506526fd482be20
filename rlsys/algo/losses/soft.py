"""Losses that bend instead of clipping: SAPO's gates and DRO's quadratic.

Arguments as in ``losses/clip.py``. Legend: T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.losses.base import TokenLosses, prepared, ratio_measures, score
from rlsys.algo.rows import RowFacts, row


@row(
    RowFacts(
        source="SAPO, Gao et al. 2025, arXiv:2511.20347",
        is_ratio_loss=True,
        aggregations=("seq_mean_token_mean",),
        peers={
            "verl": "sapo, tau_pos 1.0, tau_neg 1.05",
            "TRL": 'loss_type="sapo", sapo_temperature_pos 1.0, sapo_temperature_neg 1.05',
            "AReaL": "use_sapo_loss; refused with the decoupled loss",
            "SkyRL": "sapo",
        },
    )
)
def sapo(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> TokenLosses:
    """-A sigmoid(tau (r - 1)) 4 / tau, tau = tau_pos where A > 0, tau_neg elsewhere.

    At r = 1 the slope is that of r itself; away from it the gradient fades on both sides.
    """
    assert tau_pos > 0.0 and tau_neg > 0.0, f"tau_pos={tau_pos}, tau_neg={tau_neg}"
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    tau_T = torch.where(advantages_T > 0.0, log_ratio_T.new_tensor(tau_pos), log_ratio_T.new_tensor(tau_neg))
    gate_T = torch.sigmoid(tau_T * (log_ratio_T.exp() - 1.0)) * 4.0 / tau_T
    return TokenLosses(loss_T=-advantages_T * gate_T, measures=ratio_measures(log_ratio_T, mask_T))


@row(
    RowFacts(
        source="DRO, Richemond et al. 2024, arXiv:2405.19107; Kimi k1.5, arXiv:2501.12599",
        is_ratio_loss=True,
        anchor="behaviour",
        peers={"verl": "dro, dro_beta to be given", "ROLL": "kimi15, tau 0.1: beta"},
    )
)
def dro(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    beta: float = 0.1,
) -> TokenLosses:
    """-(A log(policy) - beta / 2 (log r)^2): REINFORCE with a spring towards the anchor."""
    assert beta >= 0.0, f"beta={beta}"
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    loss_T = -advantages_T * score(policy_logprobs_T, mask_T) + 0.5 * beta * log_ratio_T.square()
    return TokenLosses(loss_T=loss_T, measures=ratio_measures(log_ratio_T, mask_T))
