"""Which engine plays the next rollout: a plain function of what is known about the fleet.

It decides once for a rollout. All turns of a conversation are played where the first one was: its context is cached
there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """What an engine says of itself.

    Attributes:
        cache_block_tokens: tokens of one block of its key-value cache; a shorter prefix is never shared.
        num_waiting: requests that it has taken in and not begun.
        kv_share: of its key-value cache in use, 0 to 1.
        num_preempted: requests thrown out of the cache to make room, since the engine's start.

    The last three are None where the engine keeps no statistics.
    """

    cache_block_tokens: int
    num_waiting: int | None = None
    kv_share: float | None = None
    num_preempted: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """What the router knows of an engine.

    Attributes:
        step: of the proven version that it serves; None before the first.
        running_rollouts: slots taken.
        slots: most rollouts at once, at least 1. It may have fallen below ``running_rollouts``.
        report: the last one; None before the first.

    Example:
        >>> load = EngineLoad(name="rollout-0", step=4, running_rollouts=8, slots=32, report=None)
        >>> load.free_slots, load.share
        (24, 0.25)
    """

    name: str
    step: int | None
    running_rollouts: int
    slots: int
    report: EngineReport | None

    @property
    def free_slots(self) -> int:
        return max(0, self.slots - self.running_rollouts)

    @property
    def share(self) -> float:
        """How loaded it is: the larger of its slots' and its cache's share in use, and what waits inside besides.

        The slots are counted here and now; what the engine says of itself is as old as its report.
        """
        slots_share = self.running_rollouts / self.slots
        if self.report is None:
            return slots_share
        return max(slots_share, self.report.kv_share or 0.0) + (self.report.num_waiting or 0) / self.slots

    def serves(self, min_step: int) -> bool:
        return self.step is not None and self.step >= min_step

    def shares_prefix(self, num_tokens: float) -> bool:
        """Whether a prompt of ``num_tokens`` fills a block of its cache."""
        return self.report is not None and num_tokens >= self.report.cache_block_tokens


def choose_engine(
    loads: Sequence[EngineLoad], *, min_step: int, prompt_tokens: float = 0.0, played_by: Collection[str] = ()
) -> str | None:
    """Name of the engine that plays a rollout, among those that serve step ``min_step`` or later and have a free slot.

    An engine that played other members of its group goes first, where their prompt is long enough to be found in its
    cache; otherwise the least loaded one. Ties go by name. None: the rollout is parked.

    Args:
        prompt_tokens: length of the prompt.
        played_by: engines that play, or have played, members of the group.
    """
    fit = [load for load in loads if load.serves(min_step) and load.free_slots]
    near = [load for load in fit if load.name in played_by and load.shares_prefix(prompt_tokens)]
    return min(near or fit, key=lambda load: (load.share, load.name)).name if fit else None
