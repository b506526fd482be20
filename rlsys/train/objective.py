"""What the learner minimises: the rows of the algorithm, and what must be known of a whole batch or optimizer step
before its first microbatch: advantages by token, the count that the sum is divided by, and the statistics of rows that
look at the batch (law 4).

Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from rlsys.algo.advantages.tokens import TokenAdvantages
from rlsys.algo.aggregation import Aggregate, token_mean
from rlsys.algo.distillation import sampled_reverse_kl
from rlsys.algo.draws import token_draws
from rlsys.algo.kl import penalised_rewards
from rlsys.algo.measures import Mean, Measure, merge
from rlsys.algo.objective import (
    Anchor,
    Correction,
    Loss,
    ObjectiveSum,
    RowsSettled,
    RowsStatistics,
    objective_count,
    objective_statistics,
    policy_objective,
    settle_rows,
)
from rlsys.algo.prepass import Statistics
from rlsys.algo.rows import call_row, collect, facts_of, inputs_of, settle
from rlsys.algo.segments import Segments
from rlsys.batch.tensors import Microbatch
from rlsys.train import parallel
from rlsys.train.terms import Term


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """How far the policy is from the reference, and where that goes.

    Attributes:
        estimator: row of KL_ESTIMATORS.
        term: its weight.
        place: in the loss, or taken off the rewards of tokens.
        refresh_steps: the reference becomes the policy every so many steps; 0: never.
    """

    estimator: Callable[..., Tensor]
    term: Term
    place: Literal["loss", "reward"] = "loss"
    refresh_steps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """What is learnt from a teacher.

    Attributes:
        top_k: 0: ``sampled_reverse_kl``, off the advantages; else ``topk_reverse_kl``, in the loss.
        coef: weight of the divergence.
        with_reward: whether the advantages count as well.
    """

    top_k: int
    coef: float
    with_reward: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The rows, their parameters bound by ``functools.partial``. Survives pickling.

    Attributes:
        loss, correction, aggregation: rows of POLICY_LOSSES, CORRECTIONS, AGGREGATIONS.
        rejections: further rows of CORRECTIONS, that reject; a token goes where one of them rejects it.
        anchor: centre of the loss's trust region.
        advantage: row of ADVANTAGES that gives them by token; None where they come with the batch.
        kl: None: no reference policy.
        entropy: weight of the bonus; None: no bonus.
        teaching: None: no teacher.
    """

    loss: Loss
    correction: Correction
    rejections: tuple[Correction, ...] = ()
    anchor: Anchor = "proximal"
    aggregation: Callable[..., Aggregate] = token_mean
    advantage: Callable[..., TokenAdvantages] | None = None
    kl: Divergence | None = None
    entropy: Term | None = None
    teaching: Teaching | None = None

    @property
    def has_statistics(self) -> bool:
        return any(facts_of(function).prepass is not None for function in (self.loss, self.correction))

    @property
    def rejects(self) -> bool:
        return not all(facts_of(function).keeps_count for function in (self.correction, *self.rejections))

    @property
    def counts_tokens(self) -> bool:
        """Whether the sum is divided by the number of weighted tokens, which is known without a look at them."""
        return self.aggregation is token_mean and not self.rejects

    @property
    def looks_ahead(self) -> bool:
        """Whether the log-probabilities of a step's tokens are needed before the first of them is trained."""
        return self.has_statistics or self.rejects or self.kl_in_reward is not None or self.is_taught_by_sample

    @property
    def moves_reference(self) -> bool:
        return self.kl is not None and self.kl.refresh_steps > 0

    def refreshes_at(self, step: int) -> bool:
        """Whether the reference becomes the policy once ``step`` is trained."""
        return self.kl is not None and self.kl.refresh_steps > 0 and step % self.kl.refresh_steps == 0

    @property
    def kl_in_reward(self) -> Divergence | None:
        return self.kl if self.kl is not None and self.kl.place == "reward" else None

    @property
    def is_taught_by_sample(self) -> bool:
        return self.teaching is not None and self.teaching.top_k == 0

    @property
    def looks_at_policy(self) -> bool:
        """Whether statistics need the log-probabilities of the policy as it is at this very step."""
        prepass = facts_of(self.loss).prepass
        return prepass is not None and "policy_logprobs_T" in inputs_of(prepass.collect)

    def inputs(self, microbatch: Microbatch, device: str) -> dict[str, Any]:
        """What the rows are given of a microbatch, by the names of their legend: all but the log-probabilities of the
        learner."""
        positions_T = microbatch.position_ids.to(device).reshape(-1)
        segments = Segments(torch.nonzero(positions_T == 0).squeeze(1), positions_T.numel())
        inputs: dict[str, Any] = {
            "behaviour_logprobs_T": microbatch.behaviour_logprobs.to(device).reshape(-1),
            "advantages_T": microbatch.advantages.to(device).reshape(-1),
            "rewards_T": microbatch.rewards.to(device).reshape(-1),
            "mask_T": microbatch.weight_mask.to(device).reshape(-1),
            "segments": segments,
            "prompt_tokens_S": microbatch.prompt_tokens_S.to(device),
            "greedy_rewards_S": microbatch.greedy_rewards_S.to(device),
        }
        if microbatch.teacher is not None:
            inputs["teacher_logprobs_T"] = microbatch.teacher.logprobs.to(device).reshape(-1)
            inputs["teacher_candidate_logprobs_TK"] = microbatch.teacher.candidate_logprobs.to(device).flatten(0, 1)
        if "correct_T" in inputs_of(self.loss):
            inputs["correct_T"] = segments.spread(microbatch.correct_S.to(device))
        if "token_draws_T" in inputs_of(self.loss):
            inputs["token_draws_T"] = token_draws(microbatch.keys_S.to(device), segments)
        return inputs

    def give_advantages(
        self, microbatches: Sequence[dict[str, Any]], kl_coef: float, device: str
    ) -> dict[str, Measure]:
        """Put ``advantages_T`` into the inputs of all this rank's microbatches of the batch, where a row gives them by
        token or a teacher speaks to them, and ``returns_T`` with the former. A collective.

        Returns:
            What was measured on the way.
        """
        measures: dict[str, Measure] = {}
        if self.kl_in_reward is not None:
            for inputs in microbatches:
                kl_T = call_row(
                    self.kl_in_reward.estimator, {**inputs, "policy_logprobs_T": inputs["proximal_logprobs_T"]}
                )
                inputs["rewards_T"] = penalised_rewards(inputs["rewards_T"], kl_T, inputs["mask_T"], coef=kl_coef)
                measures = merge(measures, {"critic/kl": Mean.of(kl_T, inputs["mask_T"])})
        if self.advantage is not None:
            own = [collect(self.advantage, inputs) for inputs in microbatches]
            known = [statistics for statistics in own if statistics is not None]
            everywhere = _over_ranks(reduce(_plus, known), device) if known else None
            settled = settle(self.advantage, everywhere)
            for inputs in microbatches:
                result = call_row(self.advantage, inputs, settled)
                inputs["advantages_T"], inputs["returns_T"] = result.advantages_T, result.returns_T
        if self.teaching is not None:
            for inputs in microbatches:
                measures = merge(measures, self._teach(inputs, self.teaching))
        return measures

    def _teach(self, inputs: dict[str, Any], teaching: Teaching) -> dict[str, Measure]:
        if not teaching.with_reward:
            inputs["advantages_T"] = torch.zeros_like(inputs["advantages_T"])
        if not self.is_taught_by_sample:
            return {}
        divergence_T = call_row(sampled_reverse_kl, inputs)
        inputs["advantages_T"] = inputs["advantages_T"] - teaching.coef * divergence_T
        return {"teacher/reverse_kl": Mean.of(divergence_T, inputs["mask_T"])}

    def of(
        self,
        settled: RowsSettled | None,
        on_policy_mask_T: Tensor,
        inputs: Mapping[str, Any],
        *,
        kl_coef: float,
        entropy_coef: float,
    ) -> ObjectiveSum:
        """One microbatch's share; arguments as of ``policy_objective``."""
        return policy_objective(
            loss=self.loss,
            correction=self.correction,
            rejections=self.rejections,
            anchor=self.anchor,
            aggregation=self.aggregation,
            kl=self.kl.estimator if self.kl is not None and self.kl.place == "loss" else None,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            teacher_coef=self.teaching.coef if self.teaching is not None and self.teaching.top_k else 0.0,
            settled=settled,
            on_policy_mask_T=on_policy_mask_T,
            **inputs,
        )

    def count(self, microbatches: Sequence[Mapping[str, Any]], device: str) -> float:
        """What the sum over all microbatches and ranks is divided by; 1 where nothing divides it. A collective.

        Args:
            microbatches: the inputs of this rank's; log-probabilities in them only where a row rejects.
        """
        counts = [
            objective_count(
                correction=self.correction, rejections=self.rejections, aggregation=self.aggregation, **inputs
            )
            for inputs in microbatches
        ]
        if counts[0] is None:
            return 1.0
        total = parallel.total(torch.stack([count for count in counts if count is not None]).sum(), device)
        return float(total) or 1.0  # everything was rejected: the sum is 0 too

    def settle(self, microbatches: Sequence[Mapping[str, Any]], device: str) -> RowsSettled:
        """The statistics of all microbatches and ranks, settled. A collective."""
        own = reduce(
            _rows_plus,
            (
                objective_statistics(
                    loss=self.loss,
                    correction=self.correction,
                    rejections=self.rejections,
                    anchor=self.anchor,
                    **inputs,
                )
                for inputs in microbatches
            ),
        )
        everywhere = RowsStatistics(loss=_over_ranks(own.loss, device), correction=_over_ranks(own.correction, device))
        return settle_rows(loss=self.loss, correction=self.correction, statistics=everywhere)


def _rows_plus(first: RowsStatistics, second: RowsStatistics) -> RowsStatistics:
    return first.plus(second)


def _plus(first: Statistics, second: Statistics) -> Statistics:
    return first.plus(second)


def _over_ranks(statistics: Statistics | None, device: str) -> Statistics | None:
    if statistics is None:
        return None
    return Statistics(
        sums={name: parallel.total(value, device) for name, value in sorted(statistics.sums.items())},
        gathered={name: parallel.gathered(value) for name, value in sorted(statistics.gathered.items())},
    )
