"""What a metric is before it is a number: sums or extremes that know how they combine over microbatches and ranks.

A part of the program that reports a metric returns a measure, never a mean of its own: a mean of means over unequal
microbatches would depend on the packing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Measure(ABC):
    """Base of all measures.

    Attributes:
        numbers: float64, 1-D, at most a few; ``combine`` says how two of them become one.
        combine: ``sum`` or ``max``, elementwise.
    """

    combine: ClassVar[Literal["sum", "max"]] = "sum"
    numbers: Tensor

    def plus(self, other: Self) -> Self:
        """This measure over the tokens of both."""
        if self.combine == "sum":
            return replace(self, numbers=self.numbers + other.numbers)
        return replace(self, numbers=torch.maximum(self.numbers, other.numbers))

    @abstractmethod
    def value(self) -> float | None:
        """The metric; None where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Mean(Measure):
    """Sum of values and their count."""

    @classmethod
    def of(cls, values_T: Tensor, mask_T: Tensor) -> Mean:
        """Mean of ``values_T`` where ``mask_T`` (bool) is set; same shape."""
        kept = torch.where(mask_T, values_T.detach(), 0.0)
        return cls(torch.stack([kept.sum(dtype=torch.float64), mask_T.sum().double()]))

    @classmethod
    def share(cls, flags_T: Tensor, mask_T: Tensor) -> Mean:
        """How much of ``mask_T`` (bool) has ``flags_T`` (bool) set; same shape."""
        return cls(torch.stack([(flags_T & mask_T).sum(), mask_T.sum()]).double())

    def value(self) -> float | None:
        total, count = self.numbers.tolist()
        return total / count if count else None


@dataclass(frozen=True, slots=True)
class Sum(Measure):
    """Sum of values."""

    def value(self) -> float | None:
        return float(self.numbers[0])


@dataclass(frozen=True, slots=True)
class Std(Measure):
    """Standard deviation (divided by n): count, sum and sum of squares."""

    @classmethod
    def of(cls, values_T: Tensor, mask_T: Tensor) -> Std:
        """Of ``values_T`` where ``mask_T`` (bool) is set; same shape."""
        kept = torch.where(mask_T, values_T.detach(), 0.0).double()
        return cls(torch.stack([mask_T.sum().double(), kept.sum(), kept.square().sum()]))

    def value(self) -> float | None:
        count, total, squares = self.numbers.tolist()
        return math.sqrt(max(0.0, squares / count - (total / count) ** 2)) if count else None


@dataclass(frozen=True, slots=True)
class EffectiveShare(Measure):
    """Kish's effective sample size over the sample size, (sum w)^2 / (n sum w^2): 1 where all weights are equal."""

    @classmethod
    def of(cls, weights_T: Tensor, mask_T: Tensor) -> EffectiveShare:
        """Of the weights where ``mask_T`` (bool) is set; same shape."""
        kept = torch.where(mask_T, weights_T.detach(), 0.0).double()
        return cls(torch.stack([kept.sum(), kept.square().sum(), mask_T.sum().double()]))

    def value(self) -> float | None:
        total, squares, count = self.numbers.tolist()
        return total * total / (count * squares) if count and squares else None


@dataclass(frozen=True, slots=True)
class ExplainedVariance(Measure):
    """1 - var(target - estimate) / var(target): 1 for a perfect estimate, 0 for one that says nothing."""

    @classmethod
    def of(cls, estimates_T: Tensor, targets_T: Tensor, mask_T: Tensor) -> ExplainedVariance:
        """Where ``mask_T`` (bool) is set; same shapes."""
        targets = torch.where(mask_T, targets_T.detach(), 0.0).double()
        errors = targets - torch.where(mask_T, estimates_T.detach(), 0.0).double()
        sums = (targets.sum(), targets.square().sum(), errors.sum(), errors.square().sum())
        return cls(torch.stack([mask_T.sum().double(), *sums]))

    def value(self) -> float | None:
        count, total, squares, error_total, error_squares = self.numbers.tolist()
        variance = squares - total**2 / count if count else 0.0
        return 1.0 - (error_squares - error_total**2 / count) / variance if variance > 0.0 else None


@dataclass(frozen=True, slots=True)
class Max(Measure):
    """Largest value."""

    combine: ClassVar[Literal["sum", "max"]] = "max"

    @classmethod
    def of(cls, values_T: Tensor, mask_T: Tensor) -> Self:
        """Largest of ``values_T`` where ``mask_T`` (bool) is set; same shape."""
        kept = torch.where(mask_T, values_T.detach(), -torch.inf)
        largest = kept.amax() if kept.numel() else kept.new_tensor(-torch.inf)
        return cls(largest.double().reshape(1))

    def value(self) -> float | None:
        largest = float(self.numbers[0])
        return None if largest == -float("inf") else largest


@dataclass(frozen=True, slots=True)
class Min(Max):
    """Smallest value, kept as the largest of the negated ones."""

    @classmethod
    def of(cls, values_T: Tensor, mask_T: Tensor) -> Self:
        """Smallest of ``values_T`` where ``mask_T`` (bool) is set; same shape."""
        negated = Max.of(-values_T, mask_T)
        return cls(negated.numbers)

    def value(self) -> float | None:
        largest = float(self.numbers[0])
        return None if largest == -float("inf") else -largest


def merge(first: Mapping[str, Measure], second: Mapping[str, Measure]) -> dict[str, Measure]:
    """Both sets of measures as one; a name in both is combined."""
    merged = dict(first)
    for name, measure in second.items():
        merged[name] = merged[name].plus(measure) if name in merged else measure
    return merged
