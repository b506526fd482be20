"""Which engine plays the next group: a plain function of what is known about the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """What the router knows of an engine.

    Attributes:
        step: of the proven version that it serves; None before the first.
        running_rollouts: slots taken.
        slots: most rollouts at once.

    Example:
        >>> EngineLoad(name="rollout-0", step=4, running_rollouts=8, slots=256).free_slots
        248
    """

    name: str
    step: int | None
    running_rollouts: int
    slots: int

    @property
    def free_slots(self) -> int:
        return self.slots - self.running_rollouts


def choose_engine(loads: Sequence[EngineLoad], *, min_step: int, num_rollouts: int) -> str | None:
    """Name of the least loaded engine (share of its slots taken; ties by name) among those that serve step
    ``min_step`` or later and have ``num_rollouts`` slots free. None: the group is parked."""
    fit = [
        load for load in loads if load.step is not None and load.step >= min_step and load.free_slots >= num_rollouts
    ]
    if not fit:
        return None
    return min(fit, key=lambda load: (load.running_rollouts / load.slots, load.name)).name
