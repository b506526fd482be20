"""The critic: a value model beside the policy, on the same ranks and the same microbatches.

Legend: R rows, L tokens of a row, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsys.algo.losses import TokenLosses
from rlsys.algo.measures import ExplainedVariance, Mean, Measure, merge
from rlsys.algo.rows import call_row
from rlsys.batch.tensors import Microbatch, RankPart
from rlsys.records import Version
from rlsys.train.logprobs import align
from rlsys.train.trained import Trained


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticPlan:
    """What a critic is. Survives pickling.

    Attributes:
        model_path: Hugging Face folder whose trunk it starts from; its head is new, and says 0 everywhere.
        loss: row of VALUE_LOSSES, its parameters bound.
        lr: learning rate.
        warmup_steps: so many batches train it alone.
    """

    model_path: str
    loss: Callable[..., TokenLosses]
    lr: float
    warmup_steps: int


class Critic:
    """Estimates the value of what stands before each token, and learns it. Every method is a collective."""

    def __init__(self, trained: Trained, loss: Callable[..., TokenLosses], device: str) -> None:
        self.trained, self._loss, self._device = trained, loss, device

    def values(self, microbatch: Microbatch) -> Tensor:
        """[R, L], the estimate before each token; 0 at the first token of a sample."""
        positions = microbatch.position_ids.to(self._device)
        logits = self.trained(
            input_ids=microbatch.token_ids.to(self._device), position_ids=positions, use_cache=False
        ).logits
        return align(logits.squeeze(-1).float(), positions == 0)

    def train_part(self, part: RankPart, inputs: Sequence[Mapping[str, Any]], version: Version) -> dict[str, Measure]:
        """One optimizer step on the mean loss of the weighted tokens. Returns its measures.

        Args:
            inputs: of each microbatch, with ``returns_T`` and ``old_values_T``.
        """
        measures: dict[str, Measure] = {}
        is_finite, last = True, len(part.microbatches) - 1
        for index, (microbatch, of_rows) in enumerate(zip(part.microbatches, inputs, strict=True)):
            values_T = self.values(microbatch).reshape(-1)
            losses = call_row(self._loss, {**of_rows, "values_T": values_T})
            loss_sum = losses.loss_T.sum()
            is_finite = is_finite and bool(torch.isfinite(loss_sum))
            self.trained.backward(loss_sum, float(part.num_weighted_tokens), is_last=index == last)
            measures = merge(measures, {**losses.measures, **_explained(values_T, losses, of_rows)})
        self.trained.refuse_unless_finite(is_finite, "the value loss", version)
        self.trained.step(version)
        return measures


def _explained(values_T: Tensor, losses: TokenLosses, inputs: Mapping[str, Any]) -> dict[str, Measure]:
    mask_T = inputs["mask_T"]
    return {
        "critic/vf_loss": Mean.of(losses.loss_T, mask_T),
        "critic/vf_explained_var": ExplainedVariance.of(values_T, inputs["returns_T"], mask_T),
    }
