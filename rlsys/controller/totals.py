"""Sums over a run, for result.json and the progress view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlsys.records import RolloutGroup


@dataclass(slots=True)
class Totals:
    """Times in seconds of the handed-in clock.

    ``wall_s`` (training) and ``busy_s`` (engines with something to do, on average) are None while it still runs.
    """

    started: float = 0.0
    wall_s: float | None = None
    wait_for_batch_s: float = 0.0
    busy_s: float | None = None
    busy_before_s: float = 0.0
    rollouts: int = 0
    tokens: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    evals: dict[str, float] = field(default_factory=dict)

    def book(self, groups: Sequence[RolloutGroup], ages: Sequence[int]) -> None:
        """Add trained groups, with the staleness of each of their rollouts."""
        self.rollouts += len(ages)
        self.tokens += sum(rollout.num_sampled_tokens for group in groups for rollout in group.rollouts)
        self.staleness_sum += sum(ages)
        self.staleness_max = max(self.staleness_max, *ages)

    def open(self, now: float, busy_s: float) -> None:
        self.started, self.busy_before_s = now, busy_s

    def close(self, now: float, busy_s: float) -> None:
        self.wall_s, self.busy_s = now - self.started, busy_s - self.busy_before_s

    def summary(self, now: float, busy_s: float) -> dict[str, float]:
        """Flat figures; rates are over the training alone, without start-up and evaluation before and after."""
        busy_s = self.busy_s if self.busy_s is not None else busy_s - self.busy_before_s
        wall_s = max(self.wall_s if self.wall_s is not None else now - self.started, 1e-9)
        return {
            **self.evals,
            "rollouts": self.rollouts,
            "wall_s": wall_s,
            "rollouts_per_s": self.rollouts / wall_s,
            "tokens_per_s": self.tokens / wall_s,
            "idle/trainer": min(1.0, self.wait_for_batch_s / wall_s),
            "idle/rollout": max(0.0, 1.0 - busy_s / wall_s),
            "staleness/max": self.staleness_max,
            "staleness/mean": self.staleness_sum / max(self.rollouts, 1),
        }
