"""SCHEDULES: how the learning rate goes after its warm-up. A rate is a function of the optimizer step alone, and of the
step at which the run was resumed: nothing of it is saved, and a resumed run has the rates of one that never stopped.

Behind their last step, the rates of a run that is made longer are those of the longer one: ``wsd`` then goes on in its
stable phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rlsys.algo.rows import RowFacts, call_row, row, table
from rlsys.config.schema import TrainSection

Schedule = Callable[..., float]


@row(RowFacts(source="a constant"))
def constant(step: int) -> float:
    """1 in every step."""
    return 1.0


@row(RowFacts(source="a straight line"))
def linear(step: int, steps: int, *, floor: float = 0.0) -> float:
    """From 1 down to ``floor``, which is reached after the last step."""
    assert 0.0 <= floor <= 1.0, f"floor={floor}"
    return 1.0 - (1.0 - floor) * _progress(step, steps)


@row(RowFacts(source="Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts"))
def cosine(step: int, steps: int, *, floor: float = 0.0) -> float:
    """floor + (1 - floor) * (1 + cos(pi * step / steps)) / 2."""
    assert 0.0 <= floor <= 1.0, f"floor={floor}"
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, steps)))


@row(RowFacts(source="Hu et al. 2024, arXiv:2404.06395; its decay a line, as in Hägele et al. 2024, arXiv:2405.18392"))
def wsd(step: int, steps: int, *, decay_share: float = 0.2, floor: float = 0.0) -> float:
    """1, and over the last ``decay_share`` of the steps a line down to ``floor`` (warm-up, stable, decay).

    Before the decay it does not depend on ``steps``: two runs of other lengths are the same until then.
    """
    assert 0.0 < decay_share <= 1.0 and 0.0 <= floor <= 1.0, f"decay_share={decay_share}, floor={floor}"
    decay = max(1, round(decay_share * steps))
    return 1.0 - (1.0 - floor) * _progress(step - (steps - decay), decay)


SCHEDULES = table(constant, linear, cosine, wsd)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """The factor on a module's learning rates, by optimizer step.

    Attributes:
        schedule: row of SCHEDULES, its parameters bound; its steps are those after the warm-up.
        warmup_steps: linear, from 1 / warmup_steps.
        last_steps: optimizer steps of the whole run.
        rewarm_steps: likewise after a resume, on top of the rest.

    Example:
        >>> LearningRate(schedule=linear, warmup_steps=2, last_steps=6).factor(3)
        0.75
    """

    schedule: Schedule = constant
    warmup_steps: int = 0
    last_steps: int = 1
    rewarm_steps: int = 0

    def factor(self, step: int, resumed_at: int | None = None) -> float:
        """Of the step after ``step`` of them, in [0, 1].

        Args:
            resumed_at: steps that were done when the run was resumed; None: it was not.
        """
        factor = _rise(step, self.warmup_steps)
        if step >= self.warmup_steps:
            inputs = {"step": step - self.warmup_steps, "steps": max(1, self.last_steps - self.warmup_steps)}
            factor = float(call_row(self.schedule, inputs))
        return factor if resumed_at is None else factor * _rise(step - resumed_at, self.rewarm_steps)


def learning_rate(train: TrainSection, *, batches: int) -> LearningRate:
    """That of the policy. ``batches``: how many of the run train it."""
    return LearningRate(
        schedule=partial(SCHEDULES[train.schedule.name], **train.schedule.params),
        warmup_steps=train.warmup_steps,
        last_steps=batches * train.steps_per_batch,
        rewarm_steps=train.rewarm_steps,
    )


def _rise(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1, steps))


def _progress(step: int, steps: int) -> float:
    return min(1.0, max(0.0, step / steps))
