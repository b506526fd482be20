"""How a run's cores are best divided between its two sides, the rollout engines and the learner. Pure.

Both sides work at once, so a batch takes as long as the slower one needs. With C cores in all, a share theta of them
for the trainer, and B rollouts a batch:

    step_s(theta) = max(B / trained_per_s(theta C), B / made_per_s((1 - theta) C))

One term falls with theta and the other one rises, so it is least where they are equal: theta*. Where a rate grows in
proportion to the cores, t and m being the rates of one core,

    theta* = m / (m + t),    step_s(theta*) = (B / C) (1 / m + 1 / t)

This is derived here, with rates in place of times, after the split that LlamaRL (arXiv:2505.24034) argues with.
Synchronous training gives all cores to one side after the other: B / made_per_s(C) + B / trained_per_s(C), which under
proportional rates is the same number. What running both sides at once gains beyond it comes from rates that grow slower
than their cores (``by_doubling``), and from stragglers, which only a synchronous batch waits for and no rate shows.

Assumed: each side goes on as fast as it was measured, beside the other one and with the same lengths and drops; cores
divide as finely as one likes (``in_whole_cores`` does not); publication is part of the trainer's time. Whether a model
still fits into what a side is left with is not looked at. Rates are even in time: real batches vary in length, and
with a short lead (a small ``rollout.max_staleness``) each side then waits for the other one at times, so what is worked
out here is the most that a split can do. GPUs in place of cores are the same to all of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Scaling = Callable[[float], float]  # rate with so many cores / rate with one; grows with them, or stays

LEAST_SHARE = 1e-9  # of the cores, that a side is left with
BISECTIONS = 80  # halve 1 to less than the spacing of float64
EVEN = 0.02  # two rates that differ by less are called equal


def proportional(cores: float) -> float:
    """Twice the cores, twice the rate."""
    return cores


def by_doubling(factor: float) -> Scaling:
    """Twice the cores, ``factor`` times the rate, and so on: cores ** log2(factor).

    Raises ValueError outside of 1 (more cores add nothing) to 2 (proportional).
    """
    if not 1.0 <= factor <= 2.0:
        raise ValueError(f"twice the cores give 1 to 2 times the rate, got {factor}")
    exponent = math.log2(factor)
    return lambda cores: cores**exponent


class Bottleneck(Enum):
    """Which side the other one waits for."""

    ROLLOUT = "rollout"  # the trainer is idle
    TRAINER = "trainer"  # the engines are idle
    NEITHER = "neither"  # they are even


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One side as it was measured.

    Attributes:
        rollouts_per_s: that it gets done while it works, with all of its cores.
        cores: with which it was measured.
        parts: engines (on average over the time), or learner ranks.
        tokens_per_s: the same in sampled tokens; None where nobody counted.
        scaling: how the rate depends on the cores.

    Example:
        >>> Side(rollouts_per_s=6.0, cores=2.0).rate(4.0)
        12.0
    """

    rollouts_per_s: float
    cores: float
    parts: float = 1
    tokens_per_s: float | None = None
    scaling: Scaling = proportional

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rollouts_per_s), ("cores", self.cores), ("parts", self.parts)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"the {name} of a side must be above 0, got {value}")

    def rate(self, cores: float) -> float:
        """Rollouts per second with so many cores."""
        return self.rollouts_per_s * self.scaling(cores) / self.scaling(self.cores)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Cores of the two sides, and what is to be expected of them. Both sides work at once.

    Attributes:
        made_per_s, trained_per_s: what each side could do if it never waited.
    """

    trainer_cores: float
    rollout_cores: float
    made_per_s: float
    trained_per_s: float

    @property
    def trainer_share(self) -> float:
        return self.trainer_cores / (self.trainer_cores + self.rollout_cores)

    @property
    def rollouts_per_s(self) -> float:
        return min(self.made_per_s, self.trained_per_s)

    @property
    def trainer_idle(self) -> float:
        """Share of the time in which the learner waits for a batch."""
        return 1.0 - self.rollouts_per_s / self.trained_per_s

    @property
    def rollout_idle(self) -> float:
        """Share of the time in which the engines wait for room."""
        return 1.0 - self.rollouts_per_s / self.made_per_s

    @property
    def bottleneck(self) -> Bottleneck:
        if max(self.trainer_idle, self.rollout_idle) < EVEN:
            return Bottleneck.NEITHER
        return Bottleneck.ROLLOUT if self.made_per_s < self.trained_per_s else Bottleneck.TRAINER

    def step_s(self, rollouts_per_batch: int) -> float:
        """Seconds from one trained batch to the next."""
        return rollouts_per_batch / self.rollouts_per_s


def split_of(rollout: Side, trainer: Side, *, trainer_cores: float, rollout_cores: float) -> Split:
    """What these sides would do with so many cores each."""
    return Split(
        trainer_cores=trainer_cores,
        rollout_cores=rollout_cores,
        made_per_s=rollout.rate(rollout_cores),
        trained_per_s=trainer.rate(trainer_cores),
    )


def balanced(rollout: Side, trainer: Side, cores: float) -> Split:
    """The split of ``cores`` at theta*: no other one is faster.

    Where no split makes the sides equal (``by_doubling(1)``: a side that no core speeds up), it ends at
    ``LEAST_SHARE`` of one side.
    """
    low, high = LEAST_SHARE, 1.0 - LEAST_SHARE
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        split = split_of(rollout, trainer, trainer_cores=middle * cores, rollout_cores=(1 - middle) * cores)
        low, high = (middle, high) if split.trained_per_s < split.made_per_s else (low, middle)
    return split_of(rollout, trainer, trainer_cores=high * cores, rollout_cores=(1 - high) * cores)


def in_whole_cores(rollout: Side, trainer: Side, cores: float) -> Split | None:
    """The fastest split that gives the trainer a whole number of cores and leaves the engines one at least; None with
    fewer than two cores."""
    most = math.floor(cores) - 1
    if most < 1:
        return None
    ideal = balanced(rollout, trainer, cores).trainer_cores
    # the step's time falls down to theta* and rises from there, so the best is next to it
    nearest = {min(most, max(1, math.floor(ideal))), min(most, max(1, math.ceil(ideal)))}
    splits = (
        split_of(rollout, trainer, trainer_cores=number, rollout_cores=cores - number) for number in sorted(nearest)
    )
    return max(splits, key=lambda split: split.rollouts_per_s)


def synchronous_rollouts_per_s(rollout: Side, trainer: Side, cores: float) -> float:
    """Rollouts per second where generation and training take turns, each with all cores, and changing over costs
    nothing."""
    return 1.0 / (1.0 / rollout.rate(cores) + 1.0 / trainer.rate(cores))
