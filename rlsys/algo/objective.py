"""The one objective: sum over tokens of correction weight x policy loss, as a sum that the caller divides once.

Legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rlsys.algo.corrections import TokenWeights
from rlsys.algo.losses import TokenLosses
from rlsys.algo.measures import Max, Mean, Measure, Min


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSum:
    """What one microbatch adds to the objective.

    Attributes:
        loss_sum: 0-d, with gradient: sum of w_t * loss_t over the weighted tokens, divided by nothing.
        measures: metrics of loss, correction and advantages.
    """

    loss_sum: Tensor
    measures: Mapping[str, Measure]


def policy_objective(
    *,
    policy_logprobs_T: Tensor,
    proximal_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    on_policy_mask_T: Tensor,
    loss: Callable[..., TokenLosses],
    correction: Callable[..., TokenWeights],
) -> ObjectiveSum:
    """sum_t w_t * loss(policy, anchor = proximal, advantages)_t over the tokens of ``mask_T``.

    Args:
        policy_logprobs_T, proximal_logprobs_T, behaviour_logprobs_T, advantages_T: float [T]; gradient flows through
            the first only.
        mask_T: bool [T], tokens that carry weight.
        on_policy_mask_T: bool [T], tokens sampled by the very version that is trained; only measured.
        loss: row of POLICY_LOSSES with its parameters bound.
        correction: row of CORRECTIONS with its parameters bound.
    """
    weights = correction(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    losses = loss(policy_logprobs_T, proximal_logprobs_T, advantages_T, mask_T)
    weighted_T = weights.weights_T * losses.loss_T
    gap_T = (proximal_logprobs_T.detach() - behaviour_logprobs_T).abs()
    own: dict[str, Measure] = {
        "actor/pg_loss": Mean.of(weighted_T, mask_T),
        "critic/advantages/mean": Mean.of(advantages_T, mask_T),
        "critic/advantages/max": Max.of(advantages_T, mask_T),
        "critic/advantages/min": Min.of(advantages_T, mask_T),
        "rollout_corr/logprob_abs_diff_mean": Mean.of(gap_T, mask_T),
        "rollout_corr/logprob_abs_diff_max": Max.of(gap_T, mask_T),
        "rollout_corr/on_policy_logprob_abs_diff_mean": Mean.of(gap_T, mask_T & on_policy_mask_T),
    }
    return ObjectiveSum(loss_sum=weighted_T.sum(), measures={**own, **weights.measures, **losses.measures})
