"""The algorithm of a config, row by row: what a batch is built with, what the learner minimises, what is selected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rlsys.algo import (
    ADVANTAGES,
    AGGREGATIONS,
    COEFFICIENTS,
    CORRECTIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    SELECTIONS,
    SHAPINGS,
    VALUE_LOSSES,
)
from rlsys.algo.rows import Need, facts_of
from rlsys.config.schema import Config, Row
from rlsys.controller.select import Selector
from rlsys.train.critic import CriticPlan
from rlsys.train.objective import Divergence, Objective, Teaching
from rlsys.train.terms import Term


def advantage_of(config: Config) -> Callable[..., Any]:
    return _bound(ADVANTAGES, config.algo.advantage)


def needs_of(config: Config) -> tuple[Need, ...]:
    """What the advantages need of the run."""
    return facts_of(advantage_of(config)).needs


def min_compared(config: Config) -> int:
    """Rewards that a group needs so that its rollouts can learn."""
    return 2 if {Need.GROUPS, Need.GREEDY_ROLLOUT} & set(needs_of(config)) else 1


def objective_of(config: Config) -> Objective:
    algo, teacher = config.algo, config.teacher
    advantage = advantage_of(config)
    has_entropy = algo.entropy_coef > 0.0 or algo.entropy_control.name == "adaptive_entropy"
    return Objective(
        loss=_bound(POLICY_LOSSES, algo.loss),
        correction=_bound(CORRECTIONS, algo.correction),
        rejections=tuple(_bound(CORRECTIONS, row) for row in algo.rejections or ()),
        anchor=algo.anchor or "proximal",
        aggregation=_bound(AGGREGATIONS, algo.aggregation),
        advantage=advantage if facts_of(advantage).gives == "token" else None,
        kl=_divergence_of(config),
        entropy=_term(config, algo.entropy_coef, algo.entropy_control) if has_entropy else None,
        teaching=Teaching(top_k=teacher.top_k, coef=teacher.coef, with_reward=teacher.with_reward)
        if teacher.path is not None
        else None,
    )


def critic_of(config: Config, model_path: str) -> CriticPlan | None:
    """``model_path``: folder that it starts from."""
    if Need.CRITIC not in needs_of(config):
        return None
    critic = config.critic
    return CriticPlan(
        model_path=model_path,
        loss=_bound(VALUE_LOSSES, critic.loss),
        lr=critic.lr,
        warmup_steps=critic.warmup_steps,
    )


def selector_of(config: Config) -> Selector:
    algo = config.algo
    return Selector(
        shaping=tuple(_bound(SHAPINGS, row) for row in algo.shaping or ()),
        selection=tuple((row.name, _bound(SELECTIONS, row)) for row in algo.selection or ()),
        correct_at=config.reward.correct_at,
        max_tokens=config.rollout.max_tokens,
        seed=config.run.seed,
    )


def _divergence_of(config: Config) -> Divergence | None:
    algo = config.algo
    if algo.kl is None:
        return None
    return Divergence(
        estimator=_bound(KL_ESTIMATORS, algo.kl),
        term=_term(config, algo.kl_coef, algo.kl_control),
        place=algo.kl_in,
        refresh_steps=algo.reference_every_steps,
    )


def _term(config: Config, coef: float, control: Row) -> Term:
    return Term(coef=coef, control=_bound(COEFFICIENTS, control), steps=config.run.steps)


def _bound(table: Mapping[str, Callable[..., Any]], row: Row | None) -> Callable[..., Any]:
    """The row's function with its parameters."""
    if row is None:
        raise ValueError("the preset must have filled in every row of algo before a run is built")
    return partial(table[row.name], **row.params) if row.params else table[row.name]
