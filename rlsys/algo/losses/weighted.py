"""REINFORCE and the losses that weight its gradient by a stopped function of the ratio.

Arguments as in ``losses/clip.py``. sg() passes no gradient; r = policy / anchor. Legend: T packed tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlsys.algo.losses.base import TokenLosses, prepared, ratio_measures, score
from rlsys.algo.ratios import binary_kl, bounded
from rlsys.algo.rows import RowFacts, Scope, row
from rlsys.algo.segments import Segments


@row(
    RowFacts(
        source="REINFORCE, Williams 1992",
        peers={
            "verl": "gpg; bypass_mode with loss_type reinforce",
            "OpenRLHF": "policy_loss_type reinforce",
            "NeMo-RL": "disable_ppo_ratio",
            "PipelineRL": "reinforce: with the correction aipo",
        },
    )
)
def reinforce(
    policy_logprobs_T: Tensor, anchor_logprobs_T: Tensor, advantages_T: Tensor, mask_T: Tensor
) -> TokenLosses:
    """-A log(policy). The anchor is only measured against."""
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    loss_T = -advantages_T * score(policy_logprobs_T, mask_T)
    return TokenLosses(loss_T=loss_T, measures=ratio_measures(log_ratio_T, mask_T))


@row(
    RowFacts(
        source="CISPO of MiniMax-M1, 2025, arXiv:2506.13585",
        is_ratio_loss=True,
        peers={
            "verl": "cispo: clip_ratio_low 0.2 and clip_ratio_high 0.2, both sides",
            "TRL": 'loss_type="cispo": epsilon_high is the cap itself, no lower bound',
            "SkyRL": "cispo: eps_low 0, eps_high 4; at the proximal anchor or the behaviour one",
            "NeMo-RL": "use_cispo",
            "ROLL": "cispo: 0.1 and 0.1",
        },
    )
)
def cispo(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    eps_low: float = 1.0,
    eps_high: float = 4.0,
) -> TokenLosses:
    """-sg(clip(r, 1 - eps_low, 1 + eps_high)) A log(policy): every token keeps a gradient, of bounded weight.

    The paper sets no lower bound (eps_low = 1) and names no number for the upper one; 5 is the cap others run with.
    """
    assert 0.0 <= eps_low <= 1.0 and eps_high >= 0.0, f"eps_low={eps_low}, eps_high={eps_high}"
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    ratio_T = log_ratio_T.detach().exp()
    weights_T = ratio_T.clamp(1.0 - eps_low, 1.0 + eps_high)
    loss_T = -weights_T * advantages_T * score(policy_logprobs_T, mask_T)
    return TokenLosses(loss_T=loss_T, measures=ratio_measures(log_ratio_T, mask_T, clipped_T=ratio_T != weights_T))


@row(
    RowFacts(
        source="TOPR, Le Roux et al. 2025, arXiv:2503.14286",
        scope=Scope.SEQUENCE,
        is_ratio_loss=True,
        anchor="behaviour",
        peers={"ROLL": "topr: the ratio of each token (level=token)", "Trinity": "topr"},
    )
)
def topr(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    level: Literal["sequence", "token"] = "sequence",
) -> TokenLosses:
    """-A log(policy) where A > 0; -sg(min(r, 1)) A log(policy) elsewhere, r of the whole sequence.

    Args:
        level: the ratio that tapers: the product over the sequence, or each token's own.
    """
    assert level in ("sequence", "token"), f"level={level}"
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    stopped_T = log_ratio_T.detach()
    log_r_T = stopped_T if level == "token" else segments.spread(bounded(segments.sum(stopped_T)))
    weights_T = torch.where(advantages_T > 0.0, 1.0, log_r_T.exp().clamp(max=1.0))
    loss_T = -weights_T * advantages_T * score(policy_logprobs_T, mask_T)
    tapered_T = (advantages_T <= 0.0) & (log_r_T > 0.0)
    return TokenLosses(loss_T=loss_T, measures=ratio_measures(log_ratio_T, mask_T, clipped_low_T=tapered_T))


def _divergence_masked(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    kept_T: Tensor,
    cap: float,
) -> TokenLosses:
    """-A sg(min(r, cap)) log(policy) on ``kept_T``, 0 elsewhere."""
    assert cap >= 1.0, f"cap={cap}"
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    ratio_T = log_ratio_T.detach().exp()
    loss_T = -advantages_T * ratio_T.clamp(max=cap) * score(policy_logprobs_T, mask_T)
    measures = ratio_measures(log_ratio_T, mask_T, clipped_T=~kept_T, clipped_low_T=kept_T & (ratio_T > cap))
    return TokenLosses(loss_T=torch.where(kept_T, loss_T, 0.0), measures=measures)


def _probabilities(policy_logprobs_T: Tensor, anchor_logprobs_T: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    policy_T, anchor_T = (score(t.detach(), mask_T).exp() for t in (policy_logprobs_T, anchor_logprobs_T))
    return policy_T, anchor_T


@row(
    RowFacts(
        source="DPPO with total variation, 2026, arXiv:2602.04879",
        is_ratio_loss=True,
        peers={
            "verl": "dppo_tv: bounds from clip_ratio 0.2, cap from clip_ratio_c (20 where unset)",
            "SkyRL": "dppo_tv: -r A on the mask",
            "prime-rl": "its default, 0.2 and 0.2, at the behaviour anchor, without a cap; + kl_tau 1e-3 (log r)^2",
        },
    )
)
def dppo_tv(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    cap: float = 20.0,
) -> TokenLosses:
    """-A sg(min(r, cap)) log(policy), kept where policy - anchor <= delta_high (A > 0) or >= -delta_low (A <= 0).

    The bounds are on probabilities: an unlikely token may multiply, a likely one may not move far.
    """
    assert 0.0 <= delta_low <= 1.0 and 0.0 <= delta_high <= 1.0, f"delta_low={delta_low}, delta_high={delta_high}"
    p_T, q_T = _probabilities(policy_logprobs_T, anchor_logprobs_T, mask_T)
    kept_T = torch.where(advantages_T > 0.0, p_T - q_T <= delta_high, p_T - q_T >= -delta_low)
    return _divergence_masked(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T, kept_T, cap)


@row(
    RowFacts(
        source="DPPO with binary KL, 2026, arXiv:2602.04879",
        is_ratio_loss=True,
        peers={
            "verl": "dppo_kl: bounds from clip_ratio 0.2, cap from clip_ratio_c (20 where unset)",
            "SkyRL": "dppo_kl",
        },
    )
)
def dppo_kl(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    cap: float = 20.0,
) -> TokenLosses:
    """-A sg(min(r, cap)) log(policy), kept where the step back is open or KL(anchor || policy) is within its bound.

    The KL is that of two coins, q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)) with q = anchor, p = policy. The bound is
    delta_high where A > 0 and p > q, delta_low where A <= 0 and p < q; elsewhere the token moves back and is kept.
    """
    assert delta_low >= 0.0 and delta_high >= 0.0, f"delta_low={delta_low}, delta_high={delta_high}"
    p_T, q_T = _probabilities(policy_logprobs_T, anchor_logprobs_T, mask_T)
    limit_T = torch.where(advantages_T > 0.0, delta_high, delta_low)
    moves_back_T = torch.where(advantages_T > 0.0, p_T <= q_T, p_T >= q_T)
    kept_T = moves_back_T | (binary_kl(q_T, p_T) <= limit_T)
    del p_T, q_T, limit_T  # a third of what the loss keeps
    return _divergence_masked(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T, kept_T, cap)
