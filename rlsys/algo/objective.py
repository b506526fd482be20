"""The one objective: correction weight x policy loss, plus divergence, less entropy, as a sum that is divided once.

    loss_sum = sum_t c_t (w_t loss_t + kl_coef kl_t + teacher_coef D_t - entropy_coef H_t),    divided by the count

w from the correction, loss at an anchor, c and the count from the aggregation, over the tokens that no rejection took
out. Three functions take the same rows: ``objective_statistics`` before the pass, where a row has batch scope;
``objective_count`` before the pass, where a row rejects; ``policy_objective`` in it. Legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlsys.algo.aggregation import Aggregate, token_mean
from rlsys.algo.corrections import TokenWeights
from rlsys.algo.distillation import topk_reverse_kl
from rlsys.algo.losses import TokenLosses
from rlsys.algo.measures import Max, Mean, Measure, Min, Sum, merge
from rlsys.algo.offpolicy import rejected_sequences, sequence_distance, token_distance, weight_measures
from rlsys.algo.prepass import Settled, Statistics
from rlsys.algo.rows import call_row, collect, facts_of, settle

Anchor = Literal["proximal", "behaviour"]
Correction = Callable[..., TokenWeights]
Loss = Callable[..., TokenLosses]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSum:
    """What one microbatch adds to the objective.

    Attributes:
        loss_sum: 0-d, with gradient, divided by nothing.
        count: 0-d float64, to be added over microbatches and ranks and divided by; None where nothing divides.
        measures: metrics of loss, correction and advantages.
    """

    loss_sum: Tensor
    count: Tensor | None
    measures: Mapping[str, Measure]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsStatistics:
    """What the pre-passes of the rows collected; None for a row without one."""

    loss: Statistics | None
    correction: Statistics | None

    def plus(self, other: RowsStatistics) -> RowsStatistics:
        """The statistics of both microbatches, or ranks, of the same rows."""
        return RowsStatistics(
            loss=self.loss.plus(other.loss) if self.loss and other.loss else None,
            correction=self.correction.plus(other.correction) if self.correction and other.correction else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsSettled:
    """What the pre-passes of the rows settled over the whole batch; None for a row without one."""

    loss: Settled | None = None
    correction: Settled | None = None


def policy_objective(
    *,
    loss: Loss,
    correction: Correction,
    rejections: Sequence[Correction] = (),
    anchor: Anchor = "proximal",
    aggregation: Callable[..., Aggregate] = token_mean,
    kl: Callable[..., Tensor] | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    teacher_coef: float = 0.0,
    settled: RowsSettled | None = None,
    on_policy_mask_T: Tensor,
    **inputs: Any,
) -> ObjectiveSum:
    """This microbatch's share of the objective.

    Args:
        loss, correction, aggregation: rows of POLICY_LOSSES, CORRECTIONS, AGGREGATIONS with their parameters bound.
        rejections: further rows of CORRECTIONS, that reject; a token goes where one of them rejects it.
        anchor: centre of the loss's trust region.
        kl: row of KL_ESTIMATORS; None leaves the term out.
        kl_coef, entropy_coef, teacher_coef: weights of the terms; D is ``topk_reverse_kl``.
        settled: of ``settle_rows``; None where no row has batch scope.
        on_policy_mask_T: bool [T], tokens sampled by the very version that is trained; only measured.
        inputs: by the names of the legend. policy_logprobs_T, proximal_logprobs_T, behaviour_logprobs_T, advantages_T
            and mask_T always; the others where a row asks for them. Without ``segments`` nothing is measured over
            sequences. Gradient flows through policy_logprobs_T, entropy_T and candidate_logprobs_TK only, and the
            last two are needed where their weight is not 0.
    """
    settled = settled or RowsSettled()
    mask_T = inputs["mask_T"]
    inputs = _anchored(inputs, anchor)
    weights = _corrected(correction, rejections, inputs, settled.correction)
    inputs["mask_T"] = weights.mask_T
    measures = _distance(inputs, weights, mask_T, on_policy_mask_T)  # before the loss: its graph takes the memory then
    losses = call_row(loss, inputs, settled.loss)
    aggregate = call_row(aggregation, inputs)
    weighted_T = weights.weights_T * losses.loss_T
    terms_T, of_terms = _regularised(weighted_T, inputs, kl, kl_coef, entropy_coef, teacher_coef)
    pg_sum = (aggregate.coefficients_T * weighted_T.detach()).sum(dtype=torch.float64)
    counted = Sum(pg_sum[None]) if aggregate.count is None else Mean(torch.stack([pg_sum, aggregate.count]))
    return ObjectiveSum(
        loss_sum=(aggregate.coefficients_T * terms_T).sum(),
        count=aggregate.count,
        measures={**measures, **of_terms, **weights.measures, **losses.measures, "actor/pg_loss": counted},
    )


def objective_statistics(
    *,
    loss: Loss,
    correction: Correction,
    rejections: Sequence[Correction] = (),
    anchor: Anchor = "proximal",
    **inputs: Any,
) -> RowsStatistics:
    """Statistics of loss and correction over one microbatch.

    Add them over the microbatches of all ranks with ``plus``, then ``settle_rows``. Arguments as in
    ``policy_objective``; policy_logprobs_T only where the loss asks for it, detached.
    """
    inputs = _anchored(inputs, anchor)
    of_correction = collect(correction, inputs)
    inputs["mask_T"] = _left((correction, *rejections), inputs)
    return RowsStatistics(loss=collect(loss, inputs), correction=of_correction)


def settle_rows(*, loss: Loss, correction: Correction, statistics: RowsStatistics) -> RowsSettled:
    """What the summed statistics of ``objective_statistics`` come to."""
    return RowsSettled(loss=settle(loss, statistics.loss), correction=settle(correction, statistics.correction))


def objective_count(
    *,
    correction: Correction,
    rejections: Sequence[Correction] = (),
    aggregation: Callable[..., Aggregate] = token_mean,
    **inputs: Any,
) -> Tensor | None:
    """The count that ``policy_objective`` will return for this microbatch, without the policy's log-probabilities.

    For the division before the pass. Where no row rejects, the inputs need no log-probabilities at all.
    """
    return call_row(aggregation, {**inputs, "mask_T": _left((correction, *rejections), inputs)}).count


def _anchored(inputs: Mapping[str, Any], anchor: Anchor) -> dict[str, Any]:
    assert anchor in ("proximal", "behaviour"), f"anchor={anchor}"
    return {**inputs, "anchor_logprobs_T": inputs[f"{anchor}_logprobs_T"]}


def _left(corrections: Sequence[Correction], inputs: Mapping[str, Any]) -> Tensor:
    """The weighted tokens that every rejecting row keeps; each of them sees the mask as it was."""
    mask_T = inputs["mask_T"]
    for correction in corrections:
        if not facts_of(correction).keeps_count:
            mask_T = mask_T & call_row(correction, inputs).mask_T
    return mask_T


def _corrected(
    correction: Correction, rejections: Sequence[Correction], inputs: Mapping[str, Any], settled: Settled | None
) -> TokenWeights:
    """The correction's weights, and the mask that is left by all rows; each of them sees the mask as it was."""
    weights = call_row(correction, inputs, settled)
    mask_T, measures = weights.mask_T, dict(weights.measures)
    for rejection in rejections:
        rejected = call_row(rejection, inputs)
        mask_T, measures = mask_T & rejected.mask_T, merge(measures, rejected.measures)
    return TokenWeights(weights_T=weights.weights_T, mask_T=mask_T, measures=measures)


def _regularised(
    weighted_T: Tensor,
    inputs: Mapping[str, Any],
    kl: Callable[..., Tensor] | None,
    kl_coef: float,
    entropy_coef: float,
    teacher_coef: float,
) -> tuple[Tensor, dict[str, Measure]]:
    """The weighted loss with its further terms, [T], and their measures."""
    measures: dict[str, Measure] = {}
    terms_T = weighted_T
    if kl is not None:
        kl_T = call_row(kl, inputs)
        terms_T = terms_T + kl_coef * kl_T
        measures["actor/kl_loss"] = Mean.of(kl_T, inputs["mask_T"])
    if teacher_coef != 0.0:
        divergence_T = call_row(topk_reverse_kl, inputs)
        terms_T = terms_T + teacher_coef * divergence_T
        measures["teacher/reverse_kl"] = Mean.of(divergence_T, inputs["mask_T"])
    if entropy_coef != 0.0:
        terms_T = terms_T - entropy_coef * torch.where(inputs["mask_T"], inputs["entropy_T"], 0.0)
    return terms_T, measures


def _distance(
    inputs: Mapping[str, Any], weights: TokenWeights, mask_T: Tensor, on_policy_mask_T: Tensor
) -> dict[str, Measure]:
    """Measures of everything that stands before the loss. ``mask_T`` is the mask before rejections."""
    proximal_T, behaviour_T, advantages_T = (
        inputs[name] for name in ("proximal_logprobs_T", "behaviour_logprobs_T", "advantages_T")
    )
    measures = {
        "critic/advantages/mean": Mean.of(advantages_T, weights.mask_T),
        "critic/advantages/max": Max.of(advantages_T, weights.mask_T),
        "critic/advantages/min": Min.of(advantages_T, weights.mask_T),
        **token_distance(proximal_T, behaviour_T, mask_T, on_policy_mask_T),
        **weight_measures(weights.weights_T, weights.mask_T, mask_T),
    }
    if "segments" in inputs:
        measures |= sequence_distance(proximal_T, behaviour_T, mask_T, inputs["segments"])
        measures |= rejected_sequences(weights.mask_T, mask_T, inputs["segments"])
    return measures
