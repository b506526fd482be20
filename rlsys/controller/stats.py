"""Metrics of a trained batch and of the run, from records. Names follow verl's where they mean the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.buffer.staleness import first_trained_step, staleness_of
from rlsys.controller.plan import Plan
from rlsys.errors import LawBroken
from rlsys.records import NOT_SAMPLED, DropCause, RolloutGroup, StopReason, steps_of


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


def recomputed_tokens(groups: Iterable[RolloutGroup]) -> int:
    """Tokens whose KV was computed again because new weights came while a rollout was under way: at each change of the
    version all that stood before it."""
    total = 0
    for group in groups:
        for rollout in group.rollouts:
            places_T = np.flatnonzero(rollout.versions_T != NOT_SAMPLED)
            changes_T = np.diff(rollout.versions_T[places_T]) != 0
            total += int(places_T[1:][changes_T].sum())
    return total


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the two sides of a run got done in a stretch of time.

    Attributes:
        wall_s: its length.
        wait_s: of it, seconds in which the learner had nothing to train.
        train_s: of it, seconds from a batch in hand until its weights were published.
        service_s: of it, seconds in which an engine was in service, added up over the engines.
        busy_s: of these, seconds in which it had something to do.
        made: rollouts that became fit to be trained, less those that were too old in the end.
        trained: rollouts trained.
        sampled_tokens: sampled by the engines, those of dropped and of held-out answers too.
        trained_tokens: sampled tokens of the trained rollouts.
    """

    wall_s: float
    wait_s: float
    train_s: float
    service_s: float
    busy_s: float
    made: int
    trained: int
    sampled_tokens: int
    trained_tokens: int

    def since(self, earlier: Work) -> Work:
        """What was added to the sums of ``earlier``."""
        return Work(
            wall_s=self.wall_s - earlier.wall_s,
            wait_s=self.wait_s - earlier.wait_s,
            train_s=self.train_s - earlier.train_s,
            service_s=self.service_s - earlier.service_s,
            busy_s=self.busy_s - earlier.busy_s,
            made=self.made - earlier.made,
            trained=self.trained - earlier.trained,
            sampled_tokens=self.sampled_tokens - earlier.sampled_tokens,
            trained_tokens=self.trained_tokens - earlier.trained_tokens,
        )


def balance_metrics(work: Work, *, engine_cores: float, trainer_cores: float) -> dict[str, float]:
    """Rates of the two sides, each per second in which it worked; how many engines were in service, on average over the
    time; and theta*, the share of all cores with which the trainer would take as long for a batch as the engines do
    with the rest:

        theta* = m / (m + t),  m = made a second / (engines x engine_cores),  t = trained a second / trainer_cores

    (after LlamaRL, arXiv:2505.24034, with rates in place of times; derived in ``plan/balance``). It holds where a rate
    grows in proportion to the cores, those of one engine or rank or more of them. What nothing was measured of is left
    out.

    Args:
        engine_cores: cores of one engine, or GPUs where the run is on GPUs.
        trainer_cores: the same of all learner ranks.
    """
    metrics = {}
    if work.service_s > 0 and work.wall_s > 0:
        metrics["balance/engines"] = work.service_s / work.wall_s
    has_made = work.busy_s > 0 and work.made > 0 and "balance/engines" in metrics
    has_trained = work.train_s > 0 and work.trained > 0
    if has_made:
        busy_s = work.busy_s / metrics["balance/engines"]  # on average over the engines
        metrics["balance/rollouts_made_per_s"] = work.made / busy_s
        metrics["balance/rollout_tokens_per_s"] = work.sampled_tokens / busy_s
    if has_trained:
        metrics["balance/rollouts_trained_per_s"] = work.trained / work.train_s
        metrics["balance/trainer_tokens_per_s"] = work.trained_tokens / work.train_s
    if has_made and has_trained and engine_cores > 0 and trainer_cores > 0:
        made = metrics["balance/rollouts_made_per_s"] / (metrics["balance/engines"] * engine_cores)
        trained = metrics["balance/rollouts_trained_per_s"] / trainer_cores
        metrics["balance/trainer_share"] = made / (made + trained)
    return metrics


def pace_metrics(work: Work) -> dict[str, float]:
    """Rollouts trained per second of all the time, the share of it in which the learner waited for a batch, and the
    share of the engines' time in service in which they had nothing to do."""
    if work.wall_s <= 0:
        return {}
    return {
        "balance/rollouts_per_s": work.trained / work.wall_s,
        "balance/trainer_idle": min(1.0, work.wait_s / work.wall_s),
        "balance/rollout_idle": idle_share(work.service_s, work.busy_s),
    }


def idle_share(service_s: float, busy_s: float) -> float:
    """Of the seconds that engines were in service; 0 where none was."""
    return max(0.0, 1.0 - busy_s / service_s) if service_s > 0 else 0.0


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}/mean": _mean(values), f"{name}/min": float(min(values)), f"{name}/max": float(max(values))}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def trained_ages(groups: Sequence[RolloutGroup], step: int, plan: Plan) -> list[int]:
    """Staleness of every rollout that is trained at ``step``, counted over what carries weight.

    Raises LawBroken where one is older than allowed (law 2); under ``pace`` age is not bounded.
    """
    eta = plan.max_staleness
    not_before = first_trained_step(step=step, max_staleness=eta, age_policy=plan.age_policy)
    ages = staleness_of(groups, step, not_before)
    if (max(ages) > eta and plan.age_policy != "pace") or min(ages) < 0:
        raise LawBroken(f"trained at step {step} with staleness {min(ages)} to {max(ages)}, allowed is 0 to {eta}")
    return ages


def age_metrics(groups: Sequence[RolloutGroup], ages: Sequence[int], step: int, plan: Plan) -> dict[str, float]:
    """What the age policy let pass, or cut: ``staleness/violations``, rollouts that are trained older than allowed
    (``pace``), and ``staleness/masked_tokens``, sampled tokens that carry no weight for their age (``mask``)."""
    match plan.age_policy:
        case "pace":
            return {"staleness/violations": float(sum(age > plan.max_staleness for age in ages))}
        case "mask":
            not_before = first_trained_step(step=step, max_staleness=plan.max_staleness, age_policy=plan.age_policy)
            sampled = [
                steps_of(rollout.versions_T)[rollout.loss_mask_T] for group in groups for rollout in group.rollouts
            ]
            return {
                "staleness/masked_tokens": float(sum(np.count_nonzero(steps_T < not_before) for steps_T in sampled))
            }
    return {}
