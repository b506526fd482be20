"""What the learner minimises: the rows of the algorithm, and what must be known of a whole optimizer step before its
first microbatch: the count that the sum is divided by, and the statistics of rows that look at the batch (law 4).

Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rlsys.algo.aggregation import Aggregate, token_mean
from rlsys.algo.draws import token_draws
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
from rlsys.algo.rows import facts_of, inputs_of
from rlsys.algo.segments import Segments
from rlsys.batch.tensors import Microbatch
from rlsys.train import parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The rows, their parameters bound by ``functools.partial``. Survives pickling.

    Attributes:
        loss, correction, aggregation: rows of POLICY_LOSSES, CORRECTIONS, AGGREGATIONS.
        rejections: further rows of CORRECTIONS, that reject; a token goes where one of them rejects it.
        anchor: centre of the loss's trust region.
    """

    loss: Loss
    correction: Correction
    rejections: tuple[Correction, ...] = ()
    anchor: Anchor = "proximal"
    aggregation: Callable[..., Aggregate] = token_mean

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
        return self.has_statistics or self.rejects

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
            "mask_T": microbatch.weight_mask.to(device).reshape(-1),
            "segments": segments,
            "prompt_tokens_S": microbatch.prompt_tokens_S.to(device),
        }
        if "token_draws_T" in inputs_of(self.loss):
            inputs["token_draws_T"] = token_draws(microbatch.keys_S.to(device), segments)
        return inputs

    def of(self, settled: RowsSettled | None, on_policy_mask_T: Tensor, inputs: Mapping[str, Any]) -> ObjectiveSum:
        """One microbatch's share; arguments as of ``policy_objective``."""
        return policy_objective(
            loss=self.loss,
            correction=self.correction,
            rejections=self.rejections,
            anchor=self.anchor,
            aggregation=self.aggregation,
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
            _plus,
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


def _plus(first: RowsStatistics, second: RowsStatistics) -> RowsStatistics:
    return first.plus(second)


def _over_ranks(statistics: Statistics | None, device: str) -> Statistics | None:
    if statistics is None:
        return None
    return Statistics(
        sums={name: parallel.total(value, device) for name, value in sorted(statistics.sums.items())},
        gathered={name: parallel.gathered(value) for name, value in sorted(statistics.gathered.items())},
    )
