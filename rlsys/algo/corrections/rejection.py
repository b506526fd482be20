"""Corrections that reject: tokens, or whole sequences, that leave the batch. All of them shrink the count.

A weight is never touched here (w = 1), so that any of these goes beside a row that weights. Bounds of k1 are on
k = proximal / behaviour. verl states them so too, but applies them to 1 / k: its "lo_hi" is low = 1 / hi, high = 1 / lo
here. Arguments as in ``corrections/weights.py``. Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rlsys.algo.corrections.base import Level, TokenWeights, at_level
from rlsys.algo.corrections.weights import worse_binary_kl
from rlsys.algo.measures import Max, Mean
from rlsys.algo.ratios import detached_log_ratio
from rlsys.algo.rows import RowFacts, Scope, row
from rlsys.algo.segments import Segments

Over = Literal["token", "sum", "mean", "max"]


def _over(values_T: Tensor, mask_T: Tensor, segments: Segments, over: Over) -> Tensor:
    """Each token's own value, or the sum, mean or largest of its sequence, [T]."""
    assert over in get_args(Over), f"over={over}"
    if over == "token":
        return values_T
    reduce = {"sum": segments.sum, "mean": segments.mean, "max": segments.max}[over]
    return segments.spread(reduce(values_T, mask_T))


def _rejecting(name: str, statistic_T: Tensor, kept_T: Tensor, mask_T: Tensor) -> TokenWeights:
    """Weight 1, and the mask less the tokens that are not kept."""
    prefix = f"rollout_corr/rollout_rs_{name}"
    return TokenWeights(
        weights_T=torch.ones(mask_T.shape, dtype=torch.float32, device=mask_T.device),
        mask_T=mask_T & kept_T,
        measures={
            f"{prefix}_mean": Mean.of(statistic_T, mask_T),
            f"{prefix}_max": Max.of(statistic_T, mask_T),
            f"{prefix}_masked_fraction": Mean.share(~kept_T, mask_T),
        },
    )


@row(
    RowFacts(
        source="geometric and product ratio filters, https://richardli.xyz/rl-collapse",
        scope=Scope.SEQUENCE,
        keeps_count=False,
        peers={
            "verl": "rollout_rs token_k1, seq_sum_k1, seq_mean_k1 (0.999_1.001); its code bounds 1 / k, its documents "
            "say k",
            "SkyRL": "sequence_mask_metric geometric [0.99, 1.01], product [0.5, 2]; token_mask_is_threshold",
            "slime": "MIS helper, rs at token, sequence or geometric, [0.9999, 1.0001] for the last",
            "ROLL": "filter ratio, [0.8, 1.2]",
            "AReaL": "metric ratio, agg mean or sum, upper 5.0",
        },
    )
)
def reject_k1(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    over: Literal["token", "sum", "mean"] = "mean",
    low: float = 0.999,
    high: float = 1.001,
) -> TokenWeights:
    """Kept where low <= k <= high, k of the token, or its product (sum of logs) or geometric mean over the sequence."""
    assert over in ("token", "sum", "mean"), f"over={over}"
    assert 0.0 < low <= high, f"low={low}, high={high}"
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    statistic_T = _over(log_k_T, mask_T, segments, over)
    kept_T = (statistic_T >= math.log(low)) & (statistic_T <= math.log(high))
    return _rejecting(f"{over}_k1", statistic_T, kept_T, mask_T)


@row(
    RowFacts(
        source="rejection by the k2 estimator, as in verl",
        scope=Scope.SEQUENCE,
        keeps_count=False,
        peers={"verl": "rollout_rs token_k2 (1.5 to 3), seq_sum_k2, seq_mean_k2, seq_max_k2", "AReaL": "kl_k2"},
    )
)
def reject_k2(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    over: Over = "token",
    high: float = 2.0,
) -> TokenWeights:
    """Kept where (log k)^2 / 2 <= high: of the token, or its sum, mean or largest over the sequence."""
    assert high > 0.0, f"high={high}"
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    statistic_T = _over(0.5 * log_k_T.square(), mask_T, segments, over)
    return _rejecting(f"{over}_k2", statistic_T, statistic_T <= high, mask_T)


@row(
    RowFacts(
        source="rejection by the k3 estimator, as in verl",
        scope=Scope.SEQUENCE,
        keeps_count=False,
        peers={
            "verl": "rollout_rs token_k3, seq_sum_k3, seq_mean_k3 (0.001 to 0.01), seq_max_k3",
            "AReaL": "kl_k3",
        },
    )
)
def reject_k3(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    over: Over = "mean",
    high: float = 0.01,
) -> TokenWeights:
    """Kept where k - 1 - log k <= high: of the token, or its sum, mean or largest over the sequence."""
    assert high > 0.0, f"high={high}"
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    statistic_T = _over(torch.expm1(log_k_T) - log_k_T, mask_T, segments, over)
    return _rejecting(f"{over}_k3", statistic_T, statistic_T <= high, mask_T)


@row(
    RowFacts(
        source="KPop of Ring-2.6, 2026, as verl computes it",
        keeps_count=False,
        peers={"verl": "rollout_rs binary_kl", "AReaL": "metric binary_kl, upper 2.0: keeps the count (our kpop)"},
    )
)
def reject_binary_kl(
    proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor, *, high: float = 2.0
) -> TokenWeights:
    """Kept where both binary KLs of proximal and behaviour are at most ``high``."""
    assert high >= 0.0, f"high={high}"
    statistic_T = worse_binary_kl(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    return _rejecting("binary_kl", statistic_T, statistic_T <= high, mask_T)


@row(
    RowFacts(
        source="probability-difference filter of ROLL",
        scope=Scope.SEQUENCE,
        keeps_count=False,
        peers={
            "ROLL": "filter difference, [-0.2, 0.2], at token, segment (here turn), geometric or sequence",
            "prime-rl": "IPO: tokens with |difference| above 0.3 are masked, the count is kept",
        },
    )
)
def reject_difference(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    level: Level = "token",
    low: float = -0.2,
    high: float = 0.2,
) -> TokenWeights:
    """Kept where low <= proximal - behaviour <= high, as probabilities at ``level``.

    Args:
        level: ``token``; ``turn`` and ``sequence``, products; ``geometric``, geometric means over the sequence.
    """
    assert -1.0 <= low <= high <= 1.0, f"low={low}, high={high}"
    nothing_T = torch.zeros_like(behaviour_logprobs_T)
    p_T, q_T = (
        at_level(detached_log_ratio(logprobs_T, nothing_T, mask_T), mask_T, segments, level).exp()
        for logprobs_T in (proximal_logprobs_T, behaviour_logprobs_T)
    )
    statistic_T = p_T - q_T
    return _rejecting("difference", statistic_T, (statistic_T >= low) & (statistic_T <= high), mask_T)


@row(
    RowFacts(
        source="veto, https://richardli.xyz/rl-collapse",
        scope=Scope.SEQUENCE,
        keeps_count=False,
        peers={
            "verl": "rollout_token_veto_threshold 1e-4, removed; its seq_max_k2 and seq_max_k3 took its place",
            "slime": "rs_veto_threshold 1e-4: the count is kept",
            "SkyRL": "outlier_token_is_threshold_low and _high",
        },
    )
)
def veto(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    low: float = 1e-4,
    high: float = math.inf,
) -> TokenWeights:
    """A sequence is kept where every token has low <= k <= high: one bad token rejects it all."""
    assert 0.0 <= low <= high, f"low={low}, high={high}"
    k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T).exp()
    is_bad_T = mask_T & ((k_T < low) | (k_T > high))
    return _rejecting("veto", k_T, segments.spread(segments.count(is_bad_T) == 0), mask_T)
