"""Metrics of a trained batch and of the run, from records. Names follow verl's where they mean the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rlsys.buffer.staleness import first_trained_step, staleness_of
from rlsys.controller.plan import Plan
from rlsys.errors import LawBroken
from rlsys.records import DropCause, RolloutGroup, StopReason


def batch_metrics(groups: Sequence[RolloutGroup], ages: Sequence[int]) -> dict[str, float]:
    """Scores (before shaping), rewards (after it), lengths (tokens) and staleness of trained groups.

    Args:
        ages: staleness of each rollout, steps.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [rollout.num_sampled_tokens for rollout in rollouts]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    scores = [rollout.reward - rollout.shaped_by for rollout in rollouts if rollout.reward is not None]
    flat = [group for group in groups if len({*group.baseline_rewards, *_greedy_reward(group)}) == 1]
    return {
        **_spread("staleness", ages),
        **_spread("critic/score", scores),
        **_spread("critic/rewards", rewards),
        **_spread("response_length", lengths),
        **_spread("prompt_length", [rollout.num_prompt_tokens for rollout in rollouts]),
        **reward_part_means(groups),
        "response_length/clip_ratio": _mean([rollout.stop_reason is StopReason.LENGTH for rollout in rollouts]),
        "critic/groups_without_variance": len(flat) / len(groups),
        "timing_s/gen": _mean([rollout.seconds for rollout in rollouts]),
        "perf/total_num_tokens": float(sum(rollout.token_ids_T.size for rollout in rollouts)),
    }


def _greedy_reward(group: RolloutGroup) -> tuple[float, ...]:
    return () if group.greedy_reward is None else (group.greedy_reward,)


def reward_part_means(groups: Iterable[RolloutGroup]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for group in groups:
        for rollout in group.rollouts:
            for name, value in rollout.reward_parts.items():
                values.setdefault(f"critic/score_parts/{name}/mean", []).append(value)
    return {name: _mean(column) for name, column in values.items()}


def drop_metrics(dropped: Mapping[DropCause, int]) -> dict[str, float]:
    """Rollouts dropped since the start, by cause; every cause is named so that a zero can be seen."""
    return {f"dropped/{cause.value}": float(dropped.get(cause, 0)) for cause in DropCause}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}/mean": _mean(values), f"{name}/min": float(min(values)), f"{name}/max": float(max(values))}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def trained_ages(groups: Sequence[RolloutGroup], step: int, plan: Plan) -> list[int]:
    """Staleness of every rollout that is trained at ``step``, counted over what carries weight.

    Raises LawBroken where one is older than allowed (law 2).
    """
    eta = plan.max_staleness
    not_before = first_trained_step(step=step, max_staleness=eta, age_policy=plan.age_policy)
    ages = staleness_of(groups, step, not_before)
    if max(ages) > eta or min(ages) < 0:
        raise LawBroken(f"trained at step {step} with staleness {min(ages)} to {max(ages)}, allowed is 0 to {eta}")
    return ages
