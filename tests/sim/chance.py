"""Rewards by chance, the same in every life of a run: what selections act on from the first step on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlsys.records import RolloutGroup
from rlsys.rollout.play import rollout_seed


def score_by_chance(percent: int) -> Callable[..., None]:
    """Disturbs a simulated run: of the answers in training so many percent are right, whatever they are."""

    def disturb(loops: Any, fleet: Any) -> None:
        score = loops.parts.scorer.score

        async def by_chance(group: RolloutGroup) -> RolloutGroup:
            scored = await score(group)
            if group.prompt.draw.source != "sim":
                return scored
            rollouts = (
                replace(rollout, reward=float(rollout_seed(0, rollout.rollout_id) % 100 < percent))
                for rollout in scored.rollouts
            )
            return replace(scored, rollouts=tuple(rollouts))

        loops.parts.scorer.score = by_chance

    return disturb
