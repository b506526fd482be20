"""Batch scope in two pure steps: what is collected from each microbatch and added up, and what is settled from it.

A row that looks at the whole batch (a standard deviation, the k largest covariances) may not look at one microbatch:
its gradient would depend on the packing. So its pre-pass collects statistics of every microbatch of every rank, they
are added, settled once into a few numbers, and the row is applied with these. Legend: N values collected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

WHITEN_EPS = 1e-8  # under the root, as verl's masked_whiten has it


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What microbatches and ranks add up.

    Attributes:
        sums: name to float64, 1-D; added element by element.
        gathered: name to float64 [N]; added by writing one behind the other. The order carries no meaning, but is the
            same for every name.
    """

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    gathered: Mapping[str, Tensor] = field(default_factory=dict)

    def plus(self, other: Statistics) -> Statistics:
        """The statistics of both; both name the same things."""
        assert self.sums.keys() == other.sums.keys() and self.gathered.keys() == other.gathered.keys(), "names differ"
        return Statistics(
            sums={name: value + other.sums[name] for name, value in self.sums.items()},
            gathered={name: torch.cat([value, other.gathered[name]]) for name, value in self.gathered.items()},
        )


Settled = Mapping[str, Tensor]  # name to a 0-d float64 number, the same on every rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepass:
    """The two steps of a row.

    Attributes:
        collect: inputs by name, and those of the row's parameters that it needs, to Statistics. Carries no gradient.
        settle: Statistics of the whole batch, and those parameters, to Settled.
    """

    collect: Callable[..., Statistics]
    settle: Callable[..., Settled]


def moments(values: Tensor, weights: Tensor) -> Statistics:
    """Count, sum and sum of squares of ``values``, each value counted ``weights`` times (0 or more); same shape."""
    values, weights = torch.where(weights > 0, values.detach().double(), 0.0), weights.double()
    return Statistics(
        sums={"moments": torch.stack([weights.sum(), (weights * values).sum(), (weights * values.square()).sum()])}
    )


def settle_moments(statistics: Statistics) -> Settled:
    """``count``, ``mean`` and the unbiased ``variance``; of fewer than two values the variance is 0."""
    count, total, squares = statistics.sums["moments"].unbind()
    mean = total / count.clamp(min=1.0)
    variance = (squares - count * mean.square()).clamp(min=0.0) / (count - 1.0).clamp(min=1.0)
    return {"count": count, "mean": mean, "variance": torch.where(count > 1.0, variance, 0.0)}


def whiten(values: Tensor, settled: Settled) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8) with the batch's ``settled`` moments; in the dtype of ``values``."""
    return ((values.double() - settled["mean"]) / (settled["variance"] + WHITEN_EPS).sqrt()).to(values.dtype)
