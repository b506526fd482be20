"""Looking at the algorithm that a config describes: every row in its table, its parameters, what it needs, and what in
it would silently do nothing, or another thing than its name says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from rlsys.actors.algorithm import needs_of
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
from rlsys.algo.trial import try_row
from rlsys.config.schema import Config, CriticSection, Row
from rlsys.errors import ConfigError
from rlsys.plan.model_folder import did_you_mean

Table = Mapping[str, Callable[..., Any]]


def check_rows(config: Config) -> dict[str, str]:
    """Every algorithm row of a resolved config exists in its table, takes the parameters given, and accepts their
    values (tried by calling the function on three tokens). The rows fit one another and the rest of the config.

    Returns:
        Each row in words, defaults included.

    Raises:
        ConfigError: the first thing found that cannot work.
    """
    words = {key.removeprefix("algo."): check_row(key, row, table) for key, row, table in _given(config)}
    check_rows_fit(config)
    check_groups(config)
    check_kl(config)
    check_entropy(config)
    check_critic(config)
    check_teacher(config)
    return words


def _given(config: Config) -> Iterator[tuple[str, Row, Table]]:
    """Key, row and table of every row that counts."""
    algo = config.algo
    yield "algo.advantage", row_of(algo.advantage), ADVANTAGES
    yield "algo.loss", row_of(algo.loss), POLICY_LOSSES
    yield "algo.correction", row_of(algo.correction), CORRECTIONS
    yield "algo.aggregation", row_of(algo.aggregation), AGGREGATIONS
    lists = (("rejections", algo.rejections), ("shaping", algo.shaping), ("selection", algo.selection))
    for (key, rows), table in zip(lists, (CORRECTIONS, SHAPINGS, SELECTIONS), strict=True):
        yield from ((f"algo.{key}.{place}", row, table) for place, row in enumerate(rows or ()))
    if algo.kl is not None:
        yield "algo.kl", algo.kl, KL_ESTIMATORS
        yield "algo.kl_control", algo.kl_control, COEFFICIENTS
    if algo.entropy_coef or algo.entropy_control.name != "fixed":
        yield "algo.entropy_control", algo.entropy_control, COEFFICIENTS
    if Need.CRITIC in needs_of(config):
        yield "critic.loss", config.critic.loss, VALUE_LOSSES


def row_of(row: Row | None) -> Row:
    """A row of a resolved config: the preset has filled it in where it was open."""
    assert row is not None
    return row


def in_words(row: Row) -> str:
    """A row as it is called: ``tis(cap=2.0)``."""
    return f"{row.name}({', '.join(f'{name}={value!r}' for name, value in row.params.items())})"


def check_rows_fit(config: Config) -> None:
    """Rows that together silently do nothing, or another thing than their names say, are refused."""
    algo = config.algo
    loss, aggregation = row_of(algo.loss).name, row_of(algo.aggregation).name
    facts = facts_of(POLICY_LOSSES[loss])
    if facts.aggregations and aggregation not in facts.aggregations:
        raise ConfigError(
            "algo.aggregation",
            got=f"{aggregation} with the loss {loss}",
            wanted=f"{' or '.join(facts.aggregations)}, as that loss is defined",
            remedy=f"set algo.aggregation={{name: {facts.aggregations[0]}}}, or choose another loss",
        )
    if facts.anchor is not None and algo.anchor != facts.anchor:
        raise ConfigError(
            "algo.anchor",
            got=f"{algo.anchor} with the loss {loss}",
            wanted=f"{facts.anchor}, as that loss is defined",
            remedy=f"set algo.anchor={facts.anchor}",
        )
    for place, row in enumerate(algo.rejections or ()):
        if facts_of(CORRECTIONS[row.name]).keeps_count:
            rejecting = ", ".join(name for name, function in CORRECTIONS.items() if not facts_of(function).keeps_count)
            raise ConfigError(
                f"algo.rejections.{place}.name",
                got=f"{row.name}, which weighs tokens and rejects none",
                wanted=f"one of {rejecting}",
                remedy="give it as algo.correction instead",
            )


def check_groups(config: Config) -> None:
    """Rows that compare the rollouts of a question have at least two of them."""
    if config.rollout.group_size < 2 and Need.GROUPS in needs_of(config):
        free = ", ".join(name for name, row in ADVANTAGES.items() if Need.GROUPS not in facts_of(row).needs)
        raise ConfigError(
            f"rollout.group_size={config.rollout.group_size}",
            got=f"{row_of(config.algo.advantage).name}, which compares the rollouts of a question with one another",
            wanted="groups of at least two rollouts",
            remedy=f"raise rollout.group_size, or choose an advantage that needs no group: {free}",
        )
    for place, row in enumerate(config.algo.shaping or ()):
        if row.params.get("buffer", 0) > config.rollout.max_tokens:
            raise ConfigError(
                f"algo.shaping.{place}.buffer",
                got=f"{row.params['buffer']}, of answers of at most {config.rollout.max_tokens} tokens",
                wanted="at most rollout.max_tokens",
                remedy="lower it, or raise rollout.max_tokens",
            )
    for place, row in enumerate(config.algo.selection or ()):
        if row.params.get("keep", 0) >= config.rollout.group_size:
            raise ConfigError(
                f"algo.selection.{place}.keep",
                got=f"{row.params['keep']} of groups of {config.rollout.group_size}",
                wanted="fewer than rollout.group_size: more are sampled than are kept",
                remedy="raise rollout.group_size, or lower keep",
            )


def check_kl(config: Config) -> None:
    """A divergence from a reference that is named acts, and one that is not named has no settings."""
    algo = config.algo
    if algo.kl is None:
        _refuse_settings(algo, ("kl_coef", "kl_control", "kl_in", "reference_every_steps"), "algo", "algo.kl is null")
        return
    _refuse_control("algo.kl_control", algo.kl_control, "adaptive_entropy")
    if algo.kl_coef == 0.0:
        raise ConfigError(
            "algo.kl_coef",
            got="0, with a divergence named in algo.kl: it would be computed for nothing",
            wanted="more than 0",
            remedy="set algo.kl_coef=0.001, or algo.kl=null",
        )
    if algo.reference_every_steps and config.train.lora is not None:
        raise ConfigError(
            "algo.reference_every_steps",
            got=f"{algo.reference_every_steps}, with train.lora, where the reference is the base below the adapters",
            wanted="0: that base never moves",
            remedy="leave it out, or train every weight: train.lora=null",
        )
    if algo.kl_in == "loss" and not facts_of(KL_ESTIMATORS[algo.kl.name]).as_loss:
        raise ConfigError(
            "algo.kl",
            got=f"{algo.kl.name} in the loss, where its expected gradient is 0",
            wanted="an estimator whose gradient is of use: " + ", ".join(n for n in KL_ESTIMATORS if _is_for_loss(n)),
            remedy="choose one of these, or set algo.kl_in=reward",
        )
    if algo.kl_in == "reward" and facts_of(ADVANTAGES[row_of(algo.advantage).name]).gives != "token":
        raise ConfigError(
            "algo.kl_in",
            got=f"reward, with the advantage {row_of(algo.advantage).name}, which knows no rewards of tokens",
            wanted="loss, or an advantage by tokens: "
            + ", ".join(name for name, row in ADVANTAGES.items() if facts_of(row).gives == "token"),
            remedy="set algo.kl_in=loss",
        )


def _is_for_loss(name: str) -> bool:
    return facts_of(KL_ESTIMATORS[name]).as_loss


def check_entropy(config: Config) -> None:
    algo = config.algo
    _refuse_control("algo.entropy_control", algo.entropy_control, "adaptive_kl")
    if algo.entropy_coef == 0.0 and algo.entropy_control.name not in ("fixed", "adaptive_entropy"):
        _refuse_settings(algo, ("entropy_control",), "algo", "algo.entropy_coef is 0 and stays 0")


def check_critic(config: Config) -> None:
    if Need.CRITIC not in needs_of(config):
        names = tuple(CriticSection.model_fields)
        _refuse_settings(config.critic, names, "critic", "the advantage needs no critic, so that there is none")


def check_teacher(config: Config) -> None:
    teacher = config.teacher
    if teacher.path is None:
        _refuse_settings(teacher, ("top_k", "coef", "with_reward"), "teacher", "teacher.path is null: no teacher")
        return
    if config.rollout.temperature != 1.0:
        raise ConfigError(
            f"rollout.temperature={config.rollout.temperature:g}",
            got="a policy sharpened or flattened, beside a teacher that speaks at temperature 1",
            wanted="1 where there is a teacher: else the two distributions are not comparable",
            remedy="set rollout.temperature=1",
        )


def _refuse_settings(section: Any, names: tuple[str, ...], prefix: str, why: str) -> None:
    """Keys that were changed and act on nothing."""
    defaults = type(section)()
    for name in names:
        if getattr(section, name) != getattr(defaults, name):
            raise ConfigError(
                f"{prefix}.{name}",
                got=f"{getattr(section, name)!r}, which acts on nothing: {why}",
                wanted="no value",
                remedy="leave the key out, or name what it is to act on",
            )


def _refuse_control(key: str, row: Row, other: str) -> None:
    if row.name == other:
        raise ConfigError(
            f"{key}.name",
            got=f"{other}, which is made for the other term of the loss",
            wanted="one of " + ", ".join(name for name in COEFFICIENTS if name != other),
            remedy="choose one of these",
        )


def check_row(key: str, row: Row, table: Mapping[str, Callable[..., Any]]) -> str:
    """One row of one table. Returns it in words, defaults included."""
    function = table.get(row.name)
    if function is None:
        raise ConfigError(
            f"{key}.name",
            got=repr(row.name),
            wanted="one of " + ", ".join(table),
            remedy=did_you_mean(row.name, table, "choose one of these"),
        )
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name, value in row.params.items():
        if name not in parameters:
            raise ConfigError(
                f"{key}.{name}",
                got=f"{row.name} has no such parameter",
                wanted="one of " + ", ".join(parameters) if parameters else f"no parameter: {row.name} has none",
                remedy=did_you_mean(name, parameters, "remove it"),
            )
        _check_type(f"{key}.{name}", value, parameters[name])
    missing = [
        name for name, p in parameters.items() if p.default is inspect.Parameter.empty and name not in row.params
    ]
    if missing:
        raise ConfigError(
            f"{key}.{missing[0]}", got="nothing", wanted=f"a value: {row.name} needs it", remedy="write it in the row"
        )
    try:
        try_row(partial(function, **row.params))
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(
            key, got=f"{in_words(row)}: {error}", wanted="values in range", remedy=f"see the docstring of {row.name}"
        ) from error
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return in_words(Row(name=row.name, **{**defaults, **row.params}))


def _check_type(key: str, value: Any, parameter: inspect.Parameter) -> None:
    kind = parameter.annotation
    allowed = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}.get(kind)
    if allowed is None or (isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))):
        return
    raise ConfigError(key, got=repr(value), wanted=f"a {kind.__name__}", remedy=f"the default is {parameter.default!r}")
