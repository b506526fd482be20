"""What every correction shares: its result, the levels a ratio is taken at, and the measures of its weights.

Bounds are always on k = proximal / behaviour: k above 1 is a token that the learner likes better than the engine did.
Legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlsys.algo.measures import Mean, Measure
from rlsys.algo.ratios import bounded
from rlsys.algo.segments import Segments

Level = Literal["token", "turn", "sequence", "geometric"]
Mode = Literal["truncate", "clip", "mask"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWeights:
    """What a correction returns.

    Attributes:
        weights_T: [T], detached.
        mask_T: bool [T], the weighted tokens that are left: fewer than before where the row rejects.
        measures: its metrics.
    """

    weights_T: Tensor
    mask_T: Tensor
    measures: Mapping[str, Measure]


def at_level(log_k_T: Tensor, mask_T: Tensor, segments: Segments, level: Level) -> Tensor:
    """log k of each token at ``level``, within +-MAX_LOG_RATIO, [T].

    ``token``: its own. ``turn``: the sum over the run of weighted tokens that it stands in. ``sequence``: the sum over
    its sequence. ``geometric``: the mean over its sequence.
    """
    assert level in get_args(Level), f"level={level}"
    if level == "token":
        return log_k_T
    if level == "geometric":
        return segments.spread(segments.mean(log_k_T, mask_T))
    spans = segments.spans(mask_T) if level == "turn" else segments
    return bounded(spans.spread(spans.sum(log_k_T, mask_T)))


def weighted(log_k_T: Tensor, mask_T: Tensor, *, mode: Mode, low: float, high: float) -> TokenWeights:
    """Weights k within bounds: ``truncate`` min(k, high); ``clip`` k held in [low, high]; ``mask`` k, 0 outside.

    A weight of 0 keeps its token in the count.
    """
    assert mode in get_args(Mode), f"mode={mode}"
    assert 0.0 <= low <= high and high > 0.0, f"low={low}, high={high}"
    k_T = log_k_T.exp()
    above_T, below_T = k_T > high, k_T < low
    if mode == "mask":
        weights_T = torch.where(above_T | below_T, 0.0, k_T)
    else:
        weights_T = k_T.clamp(min=low if mode == "clip" else None, max=high)
    cut_T = above_T if mode == "truncate" else above_T | below_T
    return TokenWeights(
        weights_T=weights_T,
        mask_T=mask_T,
        measures={
            "rollout_corr/rollout_is_ratio_fraction_high": Mean.share(above_T, mask_T),
            "rollout_corr/rollout_is_ratio_fraction_low": Mean.share(below_T, mask_T),
            "rollout_corr/rollout_is_oob_ratio": Mean.share(cut_T, mask_T),
        },
    )


def flags_as_weights(kept_T: Tensor, like_T: Tensor, mask_T: Tensor) -> TokenWeights:
    """Weight 1 where ``kept_T`` (bool), 0 elsewhere; the count is kept."""
    return TokenWeights(
        weights_T=kept_T.to(like_T.dtype),
        mask_T=mask_T,
        measures={"rollout_corr/rollout_is_oob_ratio": Mean.share(~kept_T, mask_T)},
    )
