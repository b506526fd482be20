"""Corrections that weight: the detached factor w of each token's loss, from k = proximal / behaviour.

All of them keep the count that the loss is divided by: a token of weight 0 still counts. Arguments of every row:
proximal_logprobs_T float [T], the learner before the step; behaviour_logprobs_T float [T], the engine when it sampled;
mask_T bool [T], tokens that carry weight; no gradient flows into any. Legend: T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.corrections.base import Level, Mode, TokenWeights, at_level, flags_as_weights, weighted
from rlsys.algo.ratios import binary_kl, detached_log_ratio
from rlsys.algo.rows import RowFacts, Scope, row
from rlsys.algo.segments import Segments


@row(RowFacts(source="no correction", peers={"verl": "rollout_is null: metrics only"}))
def none(proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor) -> TokenWeights:
    """w = 1. How far the policies are apart is measured all the same."""
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    return TokenWeights(weights_T=torch.ones_like(log_k_T), mask_T=mask_T, measures={})


@row(
    RowFacts(
        source="truncated importance sampling, Ionides 2008; https://fengyao.notion.site/off-policy-rl",
        peers={
            "verl": "rollout_is token, rollout_is_threshold 2.0",
            "OpenRLHF": "is_correction_type tis: held in [0.5, 5.0]",
            "AReaL": "rejection_sampling level token, action clamp, metric ratio, upper 5.0",
            "SkyRL": "tis_ratio_type token, 2.0",
            "slime": "use_tis, tis_clip 2.0, tis_clip_low 0",
            "TRL": 'vllm_importance_sampling_mode="token_truncate", clip_max 3.0; its default is our mis',
            "NeMo-RL": "truncated_importance_sampling_type tis, off by default; with _ratio_min held from below too",
        },
    )
)
def tis(proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor, *, cap: float = 2.0) -> TokenWeights:
    """w = min(k, cap).

    Args:
        proximal_logprobs_T: float [T], the learner before the step.
        behaviour_logprobs_T: float [T], the engine when it sampled.
        mask_T: bool [T], tokens that carry weight.
        cap: largest weight, above 0.
    """
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    return weighted(log_k_T, mask_T, mode="truncate", low=0.0, high=cap)


@row(
    RowFacts(
        source="importance weights at four levels; the levels of ROLL, the modes of slime",
        scope=Scope.SEQUENCE,
        peers={
            "verl": "rollout_is token or sequence; threshold C truncates, lo_hi masks",
            "TRL": 'vllm_importance_sampling_mode="sequence_truncate", clip_max 3.0',
            "OpenRLHF": "is_correction_type tis: level token, mode clip, 0.5 and 5.0",
            "AReaL": "rejection_sampling level token or sequence (its mean: geometric), mask or clamp, upper 5.0",
            "SkyRL": "tis_ratio_type sequence, 5.0",
            "slime": "MIS helper: token, sequence or geometric; truncate, clip or mask",
            "ROLL": "is_weight at token, segment (here turn), geometric or sequence, held in [0, 1.2]",
        },
    )
)
def importance(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    level: Level = "token",
    mode: Mode = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> TokenWeights:
    """w from k at ``level``, within bounds by ``mode``; every token of a turn or sequence gets the weight of it.

    Args:
        level: ``token``; ``turn``, product over the run of weighted tokens; ``sequence``, product over the sequence;
            ``geometric``, geometric mean over the sequence.
        mode: ``truncate`` min(k, high); ``clip`` k held in [low, high]; ``mask`` k, 0 outside [low, high].
        low, high: bounds of k at that level.
    """
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    return weighted(at_level(log_k_T, mask_T, segments, level), mask_T, mode=mode, low=low, high=high)


@row(
    RowFacts(
        source="AIPO of LlamaRL, Wu et al. 2025, arXiv:2505.24034",
        peers={
            "verl": "bypass_mode with loss_type reinforce and rollout_is token, threshold 2.0",
            "prime-rl": "its former default",
            "cosmos-rl": "aipo_rho, 2 to 10",
            "PipelineRL": "reinforce: cap 1 + eps_high",
            "ROLL": "loss tis: cap 1",
        },
    )
)
def aipo(policy_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor, *, rho: float = 5.0) -> TokenWeights:
    """w = min(policy / behaviour, rho), with the policy of now: made for ``reinforce``, no proximal forward needed.

    Args:
        rho: largest weight; the paper says 2 to 10.
    """
    log_ratio_T = detached_log_ratio(policy_logprobs_T, behaviour_logprobs_T, mask_T)
    return weighted(log_ratio_T, mask_T, mode="truncate", low=0.0, high=rho)


@row(
    RowFacts(
        source="IcePop of Ring-1T, 2025, arXiv:2510.18855, equation 3",
        peers={
            "verl": "rollout_is token with threshold 0.5_5.0",
            "OpenRLHF": "is_correction_type icepop, [0.5, 5.0]",
            "AReaL": "rejection_sampling level token, action mask, lower 0.5, upper 5.0",
            "slime": "icepop_function",
            "NeMo-RL": "truncated_importance_sampling_type icepop",
        },
    )
)
def icepop(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> TokenWeights:
    """w = k where low <= k <= high, 0 elsewhere."""
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    return weighted(log_k_T, mask_T, mode="mask", low=low, high=high)


@row(
    RowFacts(
        source="KPop of Ring-2.6, 2026, as in AReaL and verl",
        peers={
            "AReaL": "rejection_sampling level token, action mask, metric binary_kl, upper 2.0",
            "verl": "rollout_rs binary_kl: shrinks the count (our reject_binary_kl)",
        },
    )
)
def kpop(
    proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor, *, limit: float = 2.0
) -> TokenWeights:
    """w = k where both binary KLs of proximal and behaviour are at most ``limit``, 0 elsewhere."""
    assert limit >= 0.0, f"limit={limit}"
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    kept_T = worse_binary_kl(proximal_logprobs_T, behaviour_logprobs_T, mask_T) <= limit
    flags = flags_as_weights(kept_T, log_k_T, mask_T)
    return TokenWeights(weights_T=flags.weights_T * log_k_T.exp(), mask_T=mask_T, measures=flags.measures)


def worse_binary_kl(proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """The larger of the two KLs of the coins proximal and behaviour, [T]."""
    p_T, q_T = (torch.where(mask_T, t.detach(), 0.0).exp() for t in (proximal_logprobs_T, behaviour_logprobs_T))
    return torch.maximum(binary_kl(p_T, q_T), binary_kl(q_T, p_T))


@row(
    RowFacts(
        source="masked importance sampling, https://richardli.xyz/rl-collapse",
        scope=Scope.SEQUENCE,
        peers={
            "verl": "rollout_is sequence with rollout_rs seq_sum_k1: that shrinks the count",
            "TRL": "its default: vllm_importance_sampling_mode=sequence_mask, clip_max 3.0",
        },
    )
)
def mis(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    low: float = 0.0,
    high: float = 2.0,
) -> TokenWeights:
    """w = product of k over the sequence where that is within [low, high], 0 for the whole sequence elsewhere."""
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    return weighted(at_level(log_k_T, mask_T, segments, "sequence"), mask_T, mode="mask", low=low, high=high)


@row(
    RowFacts(
        source="sequence-masked importance sampling, as in OpenRLHF",
        scope=Scope.SEQUENCE,
        peers={
            "OpenRLHF": "is_correction_type seq-mask-tis, [0.5, 5.0]",
            "NeMo-RL": "truncated_importance_sampling_type seq-mask-tis",
        },
    )
)
def seq_mask_tis(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> TokenWeights:
    """w = k of the token, uncut, in sequences whose geometric mean of k is within [low, high]; 0 in all others."""
    assert 0.0 <= low <= high, f"low={low}, high={high}"
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    mean_k_T = at_level(log_k_T, mask_T, segments, "geometric").exp()
    flags = flags_as_weights((mean_k_T >= low) & (mean_k_T <= high), log_k_T, mask_T)
    return TokenWeights(weights_T=flags.weights_T * log_k_T.exp(), mask_T=mask_T, measures=flags.measures)


@row(
    RowFacts(
        source="off-policy sequence masking of DeepSeek-V3.2, arXiv:2512.02556",
        scope=Scope.SEQUENCE,
        peers={
            "TRL": "off_policy_mask_threshold, off by default",
            "Trinity": "enable_sequence_masking, delta 0.1",
            "slime": "use_opsm: from the old policy (our loss opsm_clip)",
        },
    )
)
def opsm(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    delta: float = 0.1,
) -> TokenWeights:
    """w = 0 where A < 0 and the mean of log(behaviour / policy) over the sequence is above delta, 1 elsewhere.

    Args:
        delta: nats a token; the paper names none.
    """
    log_ratio_T = detached_log_ratio(policy_logprobs_T, behaviour_logprobs_T, mask_T)
    gap_T = segments.spread(segments.mean(-log_ratio_T, mask_T))
    return flags_as_weights(~((advantages_T < 0.0) & (gap_T > delta)), log_ratio_T, mask_T)


@row(
    RowFacts(
        source="sg(r 1[1 - eps < r < 1 + eps]) of GLM-5, as in SkyRL",
        peers={"SkyRL": "policy_loss_type rollout_is"},
    )
)
def policy_icepop(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    *,
    low: float = 0.8,
    high: float = 1.2,
) -> TokenWeights:
    """``icepop`` with the policy of now: w = policy / behaviour where that is within [low, high], 0 elsewhere.

    Made for ``reinforce``.
    """
    log_ratio_T = detached_log_ratio(policy_logprobs_T, behaviour_logprobs_T, mask_T)
    return weighted(log_ratio_T, mask_T, mode="mask", low=low, high=high)
