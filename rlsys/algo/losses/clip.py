"""PPO's clip and its relatives: the ratio policy / anchor of each token is held in a band. Legend: T packed tokens.

Arguments of every row, unless said otherwise: policy_logprobs_T float [T] with gradient; anchor_logprobs_T float [T],
the centre of the trust region, without gradient; advantages_T float [T]; mask_T bool [T], tokens that carry weight.
r = policy / anchor, A the advantage. A row that says no more of a bound takes it as 1 - eps_low and 1 + eps_high.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.losses.base import TokenLosses, clipped_loss, prepared, ratio_measures, score
from rlsys.algo.prepass import Prepass, Settled, Statistics
from rlsys.algo.rows import Need, RowFacts, Scope, row
from rlsys.algo.segments import Segments


@row(
    RowFacts(
        source="PPO, Schulman et al. 2017, arXiv:1707.06347",
        is_ratio_loss=True,
        peers={
            "verl": "vanilla, clip_ratio 0.2, with the dual clip at 3 switched on",
            "TRL": "epsilon 0.2, epsilon_high; its asynchronous trainer: at the behaviour anchor, without a correction",
            "OpenRLHF": "policy_loss_type ppo, eps_clip 0.2",
            "AReaL": "eps_clip 0.2, eps_clip_higher; at the proximal anchor where use_decoupled_loss",
            "SkyRL": "regular",
            "PipelineRL": "policy_loss ppo, its default",
        },
    )
)
def ppo_clip(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> TokenLosses:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)).

    Args:
        policy_logprobs_T: float [T], with gradient.
        anchor_logprobs_T: float [T], centre of the trust region, no gradient flows into it.
        advantages_T: float [T].
        mask_T: bool [T], tokens that carry weight.
    """
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    loss_T, clipped_T = clipped_loss(log_ratio_T, advantages_T, eps_low, eps_high)
    return TokenLosses(loss_T=loss_T, measures=ratio_measures(log_ratio_T, mask_T, clipped_T=clipped_T))


@row(
    RowFacts(
        source="DAPO, Yu et al. 2025, arXiv:2503.14476 (clip-higher)",
        is_ratio_loss=True,
        peers={
            "verl": "vanilla with clip_ratio_low 0.2, clip_ratio_high 0.28, token-mean",
            "TRL": 'loss_type="dapo", epsilon_high 0.28',
            "OpenRLHF": "eps_clip_low_high 0.2 0.28",
        },
    )
)
def dapo_clip(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
) -> TokenLosses:
    """``ppo_clip`` with more room above than below, so that unlikely tokens can grow."""
    return ppo_clip(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T, eps_low=eps_low, eps_high=eps_high)


@row(
    RowFacts(
        source="dual-clip PPO, Ye et al. 2019, arXiv:1912.09729",
        is_ratio_loss=True,
        peers={
            "verl": "vanilla, clip_ratio_c 3.0, always on",
            "AReaL": "c_clip, off by default",
            "OpenRLHF": "dual_clip, off by default",
            "SkyRL": "dual_clip, c 3",
            "NeMo-RL": "ratio_clip_c, off by default",
            "slime": "eps_clip_c, off by default",
        },
    )
)
def dual_clip(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    c: float = 3.0,
) -> TokenLosses:
    """``ppo_clip``, and where A < 0 at most -c A: a token far more likely than before is pushed down no further.

    Args:
        c: above 1.
    """
    assert c > 1.0, f"c={c}"
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    loss_T, clipped_T = clipped_loss(log_ratio_T, advantages_T, eps_low, eps_high)
    cut_T = (advantages_T < 0.0) & (loss_T.detach() > -c * advantages_T)
    return TokenLosses(
        loss_T=torch.where(cut_T, -c * advantages_T, loss_T),
        measures=ratio_measures(log_ratio_T, mask_T, clipped_T=clipped_T, clipped_low_T=cut_T),
    )


@row(
    RowFacts(
        source="INTELLECT-2, 2025, arXiv:2505.07291 (two-sided clipping)",
        is_ratio_loss=True,
        peers={"TRL": "delta, off by default: r is held at it where the clip does not act"},
    )
)
def two_sided_clip(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    delta: float = 4.0,
) -> TokenLosses:
    """max(-A min(r, delta), -A clip(r, 1 - eps_low, 1 + eps_high)). The same as ``dual_clip`` with c = delta.

    Args:
        delta: above 1 + eps_high.
    """
    assert delta > 1.0 + eps_high, f"delta={delta} is not above 1 + eps_high={1.0 + eps_high}"
    return dual_clip(
        policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T, eps_low=eps_low, eps_high=eps_high, c=delta
    )


@row(
    RowFacts(
        source="off-policy sequence masking of DeepSeek-V3.2, arXiv:2512.02556, as slime computes it",
        scope=Scope.SEQUENCE,
        is_ratio_loss=True,
        peers={
            "slime": "use_opsm, opsm_delta 1e-4",
            "TRL": "off_policy_mask_threshold, off: from the behaviour policy (our correction opsm)",
            "Trinity": "enable_sequence_masking, delta 0.1",
        },
    )
)
def opsm_clip(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    delta: float = 1e-4,
) -> TokenLosses:
    """``ppo_clip``, less the tokens with A < 0 of sequences whose mean log(anchor / policy) is above delta.

    The correction ``opsm`` measures from the behaviour policy instead, and goes with any loss.
    """
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    loss_T, clipped_T = clipped_loss(log_ratio_T, advantages_T, eps_low, eps_high)
    gap_T = segments.spread(segments.mean(-log_ratio_T.detach(), mask_T))
    cut_T = (advantages_T < 0.0) & (gap_T > delta)
    return TokenLosses(
        loss_T=torch.where(cut_T, 0.0, loss_T),
        measures=ratio_measures(log_ratio_T, mask_T, clipped_T=clipped_T, clipped_low_T=cut_T),
    )


def _collect_correct(mask_T: Tensor, correct_T: Tensor) -> Statistics:
    return Statistics(sums={"tokens": torch.stack([mask_T.sum(), (mask_T & correct_T).sum()]).double()})


def _settle_correct(statistics: Statistics) -> Settled:
    tokens, correct = statistics.sums["tokens"].unbind()
    return {"tokens_per_correct": torch.where(correct > 0, tokens / correct.clamp(min=1.0), 0.0)}


@row(
    RowFacts(
        source="VAPO, Yue et al. 2025, arXiv:2504.05118",
        scope=Scope.BATCH,
        is_ratio_loss=True,
        needs=(Need.CORRECT_FLAGS,),
        aggregations=("token_mean",),
        peers={"NeMo-RL": "positive_example_nll_weight, off by default"},
        prepass=Prepass(collect=_collect_correct, settle=_settle_correct),
    )
)
def vapo_clip(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    correct_T: Tensor,
    settled: Settled,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    nll_weight: float = 0.1,
) -> TokenLosses:
    """``ppo_clip`` + nll_weight * (mean of -log(policy) over the tokens of right answers).

    The second mean has its own count: -log(policy) is multiplied by (tokens / tokens of right answers) of the batch, so
    that the one division by the count of tokens turns it into that mean. Without a right answer the term is 0.

    Args:
        correct_T: bool [T], tokens of rollouts whose answer is right.
    """
    log_ratio_T, advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    loss_T, clipped_T = clipped_loss(log_ratio_T, advantages_T, eps_low, eps_high)
    scale = nll_weight * settled["tokens_per_correct"].to(loss_T.dtype)
    nll_T = torch.where(correct_T, -score(policy_logprobs_T, mask_T), 0.0)
    return TokenLosses(loss_T=loss_T + scale * nll_T, measures=ratio_measures(log_ratio_T, mask_T, clipped_T=clipped_T))
