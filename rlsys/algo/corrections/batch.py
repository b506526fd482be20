"""Corrections that look at the whole batch: weights of mean 1, and M2PO's mask.

Arguments as in ``corrections/weights.py``. Legend: T packed tokens, S sequences, N weighted tokens of the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlsys.algo.corrections.base import TokenWeights, at_level, flags_as_weights, weighted
from rlsys.algo.measures import Mean
from rlsys.algo.prepass import Prepass, Settled, Statistics
from rlsys.algo.ratios import detached_log_ratio
from rlsys.algo.rows import RowFacts, Scope, row
from rlsys.algo.segments import Segments


def _truncated(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    level: Literal["token", "sequence"],
    cap: float,
) -> TokenWeights:
    assert level in ("token", "sequence"), f"level={level}"
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    return weighted(at_level(log_k_T, mask_T, segments, level), mask_T, mode="truncate", low=0.0, high=cap)


def _collect_weights(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    level: Literal["token", "sequence"] = "token",
    cap: float = 2.0,
) -> Statistics:
    weights_T = _truncated(proximal_logprobs_T, behaviour_logprobs_T, mask_T, segments, level, cap).weights_T.double()
    if level == "token":
        total, count = torch.where(mask_T, weights_T, 0.0).sum(), mask_T.sum()
    else:
        total, count = segments.mean(weights_T, mask_T).sum(), (segments.count(mask_T) > 0).sum()
    return Statistics(sums={"weights": torch.stack([total, count.double()])})


def _settle_weights(statistics: Statistics) -> Settled:
    total, count = statistics.sums["weights"].unbind()
    mean = total / count.clamp(min=1.0)
    return {"mean_weight": torch.where(mean > 1e-8, mean, 1.0)}  # nothing to scale up where all weights are 0


@row(
    RowFacts(
        source="truncated weights of mean 1 (self-normalised importance sampling), as in verl",
        scope=Scope.BATCH,
        peers={
            "verl": "rollout_is_batch_normalize, off by default",
            "slime": "MIS helper, tis_batch_normalize",
        },
        prepass=Prepass(collect=_collect_weights, settle=_settle_weights),
    )
)
def normalised_tis(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    settled: Settled,
    *,
    level: Literal["token", "sequence"] = "token",
    cap: float = 2.0,
) -> TokenWeights:
    """w = min(k, cap) / its mean over the batch.

    Args:
        level: ``token``, the mean is over tokens; ``sequence``, k is the product over the sequence, the mean is over
            sequences.
        cap: largest weight before the division.
    """
    plain = _truncated(proximal_logprobs_T, behaviour_logprobs_T, mask_T, segments, level, cap)
    mean = settled["mean_weight"].to(plain.weights_T.dtype)
    factor = Mean.of(settled["mean_weight"].expand(mask_T.shape), mask_T)
    measures = {**plain.measures, "rollout_corr/rollout_is_batch_norm_factor": factor}
    return TokenWeights(weights_T=plain.weights_T / mean, mask_T=mask_T, measures=measures)


def _second_moments(proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    return detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T).double().square()


def _collect_m2(proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor) -> Statistics:
    return Statistics(gathered={"m2": _second_moments(proximal_logprobs_T, behaviour_logprobs_T, mask_T)[mask_T]})


def _settle_m2(statistics: Statistics, *, threshold: float = 0.04) -> Settled:
    """The smallest value that goes: the longest run of smallest values with a mean below the threshold stays."""
    values_N = statistics.gathered["m2"].sort().values
    ranks_N = torch.arange(1, values_N.numel() + 1, device=values_N.device)
    num_kept = int((values_N.cumsum(0) / ranks_N < threshold).sum())  # the mean only rises, so these come first
    infinite = values_N.new_tensor(torch.inf)
    return {"first_cut": values_N[num_kept] if num_kept < values_N.numel() else infinite}


@row(
    RowFacts(
        source="M2PO, 2025, arXiv:2510.01161, as AReaL computes it",
        scope=Scope.BATCH,
        peers={"AReaL": "m2_threshold, off by default; of equal values it drops some, here all"},
        prepass=Prepass(collect=_collect_m2, settle=_settle_m2),
    )
)
def m2po(
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    mask_T: Tensor,
    settled: Settled,
    *,
    threshold: float = 0.04,
) -> TokenWeights:
    """w = 0 for the tokens of the batch with the largest (log k)^2, until the mean of the rest is below ``threshold``;
    1 for the rest. Equal values go together.
    """
    assert threshold > 0.0, f"threshold={threshold}"
    m2_T = _second_moments(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    return flags_as_weights(m2_T < settled["first_cut"], proximal_logprobs_T, mask_T)
