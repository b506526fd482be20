"""Losses whose ratio is one number for each sequence: GSPO, its token form, and GMPO.

Arguments as in ``losses/clip.py``, and ``segments``. Each token of a sequence gets the sequence's loss: they go with
``seq_mean_token_mean``. Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.losses.base import TokenLosses, clipped_loss, prepared, ratio_measures
from rlsys.algo.ratios import bounded
from rlsys.algo.rows import RowFacts, Scope, row
from rlsys.algo.segments import Segments

_PEERS_OF_GSPO = {
    "verl": "gspo: the token form, whatever loss_agg_mode says; bounds clip_ratio_low and clip_ratio_high, 0.2 where "
    "unset; log ratio at most 10",
    "TRL": 'importance_sampling_level="sequence", bounds epsilon, 0.2 where unset',
    "OpenRLHF": "policy_loss_type gspo; with is_correction_enable the ratio is to the behaviour policy",
    "AReaL": "importance_sampling_level: sequence; averages the advantages of a sequence; bounds eps_clip 0.2",
    "SkyRL": "gspo",
    "NeMo-RL": "sequence_level_importance_ratios",
}


@row(
    RowFacts(
        source="GSPO, Zheng et al. 2025, arXiv:2507.18071",
        scope=Scope.SEQUENCE,
        is_ratio_loss=True,
        aggregations=("seq_mean_token_mean",),
        peers=_PEERS_OF_GSPO,
    )
)
def gspo(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
) -> TokenLosses:
    """max(-A s, -A clip(s, 1 - eps_low, 1 + eps_high)) with s = exp(mean over the sequence of log r)."""
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    log_s_T = segments.spread(segments.mean(log_ratio_T, mask_T))
    loss_T, clipped_T = clipped_loss(log_s_T, advantages_T, eps_low, eps_high)
    return TokenLosses(loss_T=loss_T, measures=ratio_measures(log_ratio_T, mask_T, clipped_T=clipped_T))


@row(
    RowFacts(
        source="GSPO-token, Zheng et al. 2025, arXiv:2507.18071",
        scope=Scope.SEQUENCE,
        is_ratio_loss=True,
        aggregations=("seq_mean_token_mean",),
        peers=_PEERS_OF_GSPO,
    )
)
def gspo_token(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
) -> TokenLosses:
    """``gspo`` with s_t = sg(s) policy_t / sg(policy_t): the value is s, the gradient is each token's own.

    Where a sequence has one advantage, its gradient is that of ``gspo``; where its tokens differ, each token moves by
    its own.
    """
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    log_s_T = segments.spread(segments.mean(log_ratio_T.detach(), mask_T)) + log_ratio_T - log_ratio_T.detach()
    loss_T, clipped_T = clipped_loss(log_s_T, advantages_T, eps_low, eps_high)
    return TokenLosses(loss_T=loss_T, measures=ratio_measures(log_ratio_T, mask_T, clipped_T=clipped_T))


@row(
    RowFacts(
        source="GMPO, Zhao et al. 2025, arXiv:2507.20673",
        scope=Scope.SEQUENCE,
        is_ratio_loss=True,
        aggregations=("seq_mean_token_mean",),
        peers={"verl": "geo_mean; a correction's weights enter by their geometric mean, here by their mean"},
    )
)
def gmpo(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    eps_low: float = 0.4,
    eps_high: float = 0.4,
) -> TokenLosses:
    """-mean(A) exp(mean over the sequence of l'), l' the worse of l = log r and l held in [-eps_low, eps_high].

    The worse one is the smaller where A > 0, the larger where A < 0, and 0 where A = 0. The bounds are on log r.
    """
    assert eps_low >= 0.0 and eps_high >= 0.0, f"eps_low={eps_low}, eps_high={eps_high}"
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    above_T = (advantages_T > 0.0) & (log_ratio_T.detach() > eps_high)
    below_T = (advantages_T < 0.0) & (log_ratio_T.detach() < -eps_low)
    held_T = torch.where(above_T | below_T, log_ratio_T.detach().clamp(-eps_low, eps_high), log_ratio_T)
    worse_T = torch.where(advantages_T == 0.0, 0.0, held_T)
    ratio_S = bounded(segments.mean(worse_T, mask_T)).exp()
    loss_S = -segments.mean(advantages_T, mask_T) * ratio_S
    measures = ratio_measures(log_ratio_T, mask_T, clipped_T=above_T, clipped_low_T=below_T)
    return TokenLosses(loss_T=torch.where(mask_T, segments.spread(loss_S), 0.0), measures=measures)
