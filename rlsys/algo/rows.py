"""Rows of the tables: plain functions, called with what their positional parameters are named after.

A row is a function. Its positional parameters are inputs, named by the LEGEND; its keyword parameters are what a user
sets. What else is known of a row (scope, count, source, names elsewhere) sits on it, put there by ``row``. A function
without it can stand in a table too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, TypeVar

from rlsys.algo.prepass import Prepass, Settled, Statistics

Row = Callable[..., Any]
F = TypeVar("F", bound=Row)

LEGEND: Mapping[str, str] = {
    "policy_logprobs_T": "float [T], nats, the learner now, with gradient",
    "anchor_logprobs_T": "float [T], centre of the trust region: proximal or behaviour log-probabilities",
    "proximal_logprobs_T": "float [T], the learner before the first step on this batch",
    "behaviour_logprobs_T": "float [T], the engine when it sampled the token",
    "ref_logprobs_T": "float [T], the reference policy",
    "teacher_logprobs_T": "float [T], the teacher, of the same tokens",
    "candidate_logprobs_TK": "float [T, K], the learner now, of the teacher's likeliest tokens, with gradient",
    "teacher_candidate_logprobs_TK": "float [T, K], the teacher, of its likeliest tokens",
    "advantages_T": "float [T]",
    "mask_T": "bool [T], tokens that carry weight",
    "segments": "Segments over T, one for each sequence",
    "token_draws_T": "float64 [T] in [0, 1), of each token its own, the same in every packing",
    "correct_T": "bool [T], tokens of a rollout whose answer is right",
    "entropy_T": "float [T], nats, of the distribution that the token was drawn from, with gradient",
    "prompt_tokens_S": "float [S], weighted tokens of all rollouts of the sequence's prompt, over the whole batch",
    "values_T": "float [T], the critic's estimate before each token; in a value loss with gradient",
    "old_values_T": "float [T], the critic's estimate before the first step on this batch",
    "returns_T": "float [T], what the critic is to predict",
    "rewards_S": "float [S], one for each rollout, the groups one after another",
    "group_starts_G": "int64 [G], index of the first reward of each group, ascending; the first is 0",
    "lengths_S": "int or float [S], weighted tokens of each rollout; 0 for one that is in the baseline only",
    "reward_parts_SK": "float [S, K], the parts of each rollout's reward",
    "scores_S": "float [S], what the reward function gave, before any shaping",
    "truncated_S": "bool [S], rollouts that were cut at the token limit",
    "correct_S": "bool [S], rollouts whose answer is right",
    "penalties_S": "float [S], the part of each rollout's reward that is named penalty; 0 where there is none",
    "draws_S": "float64 [S] in [0, 1), of each rollout its own, the same in every process",
    "answer_ids_N": "int64 [N], sampled tokens, the rollouts one after another",
    "answers": "Segments over N, one for each rollout",
    "max_tokens": "int, most tokens that are sampled for an answer",
    "greedy_rewards_S": "float [S], reward of the greedy rollout of the sequence's prompt",
    "rewards_T": "float [T], rewards on the tokens that earned them",
    "turn_rewards_U": "float [U], one for each turn, the turns of a rollout in order, the rollouts one after another",
    "turn_keys_U": "int64 [U], the turn's index in its rollout",
    "turn_states_U": "int64 [U], a key of what the environment said before the turn",
    "turn_rollouts_U": "int64 [U], index in S of the turn's rollout, ascending",
    "settled": "numbers of the whole batch, from the row's pre-pass",
    "kept": "float, a coefficient as it was left by the step before",
    "measured": "float, nats, what the coefficient's term came to: a divergence a rollout, an entropy a token",
    "rollouts": "int, trained in the step",
    "step": "int, steps done, from 0",
    "steps": "int, of the run",
}


class Scope(Enum):
    """How far a row looks."""

    TOKEN = "token"  # at each token alone
    SEQUENCE = "sequence"  # at the tokens of a sequence, or the members of a group
    BATCH = "batch"  # at the whole batch: needs its pre-pass over all microbatches and ranks


class Need(Enum):
    """What a row needs of the run, beyond rollouts and their rewards."""

    CRITIC = "a critic"
    GREEDY_ROLLOUT = "a greedy rollout for each prompt"
    REWARD_PARTS = "a reward function that returns its parts"
    GROUPS = "groups of at least two rollouts"
    TURNS = "rewards for each turn"
    CORRECT_FLAGS = "to know which rollouts are right"
    REFERENCE = "a reference policy"
    TEACHER = "a teacher"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFacts:
    """What is known of a row.

    Attributes:
        source: where the formula comes from.
        scope: how far it looks.
        keeps_count: False where it takes tokens out of the count that the loss is divided by.
        is_ratio_loss: its trust region acts only away from policy = anchor: with one step a batch at the proximal
            anchor it is REINFORCE.
        gives: what an advantage row returns: a number for each rollout, turn or token.
        needs: what the run must have.
        aggregations: names of those it is defined with; empty where any will do.
        anchor: the anchor it was published with; None where it has none, or either will do.
        as_loss: False for a divergence whose gradient is useless in a loss.
        peers: system to its name and defaults there.
        prepass: of a row of batch scope.
    """

    source: str = ""
    scope: Scope = Scope.TOKEN
    keeps_count: bool = True
    is_ratio_loss: bool = False
    gives: Literal["rollout", "turn", "token"] = "rollout"
    needs: tuple[Need, ...] = ()
    aggregations: tuple[str, ...] = ()
    anchor: Literal["proximal", "behaviour"] | None = None
    as_loss: bool = True
    peers: Mapping[str, str] = field(default_factory=dict)
    prepass: Prepass | None = None

    def __post_init__(self) -> None:
        assert (self.scope is Scope.BATCH) == (self.prepass is not None), "batch scope and pre-pass go together"


def row(facts: RowFacts) -> Callable[[F], F]:
    """Decorator: puts ``facts`` on a row."""

    def attach(function: F) -> F:
        unknown = [name for name in inputs_of(function) if name not in LEGEND]
        assert not unknown, f"{function.__name__} asks for {unknown}, which the legend does not name"
        function.row_facts = facts  # type: ignore[attr-defined]
        return function

    return attach


def table(*rows: Row) -> dict[str, Row]:
    """The rows by their names."""
    return {function.__name__: function for function in rows}


def facts_of(function: Row) -> RowFacts:
    """The facts of a row, bound parameters or not; empty ones for a function that has none."""
    return getattr(_unbound(function)[0], "row_facts", RowFacts())


def inputs_of(function: Row) -> tuple[str, ...]:
    """Names of the inputs that a row asks for."""
    return tuple(name for name, kind in _parameters(_unbound(function)[0]).items() if kind is not _KEYWORD)


def call_row(function: Row, inputs: Mapping[str, Any], settled: Settled | None = None) -> Any:
    """The row's result, called with those of ``inputs`` that it asks for.

    Args:
        function: a row, its parameters bound by ``functools.partial`` or left at their defaults.
        inputs: by the names of the legend; more than it asks for is fine.
        settled: of its pre-pass, for a row of batch scope.

    Raises:
        TypeError: an input that it asks for is not there.
    """
    return _call(function, inputs if settled is None else {**inputs, "settled": settled}, {})


def collect(function: Row, inputs: Mapping[str, Any]) -> Statistics | None:
    """First step of the row's pre-pass, over one microbatch; None for a row that has none. Arguments as in call_row."""
    prepass = facts_of(function).prepass
    return None if prepass is None else _call(prepass.collect, inputs, _unbound(function)[1])


def settle(function: Row, statistics: Statistics | None) -> Settled | None:
    """Second step of the row's pre-pass, from the statistics of the whole batch; None for a row that has none."""
    prepass = facts_of(function).prepass
    if prepass is None or statistics is None:
        return None
    return _call(prepass.settle, {"statistics": statistics}, _unbound(function)[1])


def call_whole(function: Row, inputs: Mapping[str, Any]) -> Any:
    """The row's result where ``inputs`` are the whole batch: its pre-pass included."""
    return call_row(function, inputs, settle(function, collect(function, inputs)))


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _call(function: Row, inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> Any:
    names = inputs_of(function)
    missing = [name for name in names if name not in inputs]
    if missing:
        raise TypeError(f"{_unbound(function)[0].__name__} asks for {', '.join(missing)}; given: {', '.join(inputs)}")
    known = _parameters(_unbound(function)[0])
    kept = {name: value for name, value in parameters.items() if known.get(name) is _KEYWORD}
    return function(*(inputs[name] for name in names), **kept)


def _unbound(function: Row) -> tuple[Row, dict[str, Any]]:
    """The function itself, and the keywords bound to it."""
    if isinstance(function, functools.partial):
        inner, keywords = _unbound(function.func)
        assert not function.args, "bind keywords only: inputs are given by name"
        return inner, {**keywords, **function.keywords}
    return function, {}


@functools.cache
def _parameters(function: Row) -> dict[str, inspect._ParameterKind]:
    return {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
