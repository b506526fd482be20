"""Log ratios of two policies, bounded, and safe against whatever stands on a masked token.

Legend: T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp() of more makes float32 products with an advantage useless, and soon infinite
MIN_PROBABILITY = 1e-6  # 1 - p must not round to 0 in float32; verl's bound


def bounded(log_ratio: Tensor) -> Tensor:
    """Within +-MAX_LOG_RATIO, any shape; beyond it no gradient flows."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def log_ratio(numerator_logprobs_T: Tensor, denominator_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """log(numerator / denominator), within +-MAX_LOG_RATIO; 0 where the mask is False. All [T]."""
    return bounded(torch.where(mask_T, numerator_logprobs_T - denominator_logprobs_T, 0.0))


def detached_log_ratio(numerator_logprobs_T: Tensor, denominator_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """``log_ratio`` without gradient; checks shapes."""
    assert numerator_logprobs_T.ndim == 1 and mask_T.dtype == torch.bool, f"{numerator_logprobs_T.shape} {mask_T.dtype}"
    assert numerator_logprobs_T.shape == denominator_logprobs_T.shape == mask_T.shape, "shapes differ"
    return log_ratio(numerator_logprobs_T.detach(), denominator_logprobs_T.detach(), mask_T)


def binary_kl(p_T: Tensor, q_T: Tensor) -> Tensor:
    """KL of two coins, p ln(p / q) + (1 - p) ln((1 - p) / (1 - q)), [T]; p and q are held off 0 and 1."""
    p_T, q_T = (t.clamp(MIN_PROBABILITY, 1.0 - MIN_PROBABILITY) for t in (p_T, q_T))
    return p_T * (p_T / q_T).log() + (1.0 - p_T) * ((1.0 - p_T) / (1.0 - q_T)).log()
