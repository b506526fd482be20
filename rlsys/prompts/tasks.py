"""Generated tasks: questions made by name, each with its own scorer.

A task's parameters (``data.task: {name: reversed_sum, digits: 2}``) are the keywords of its function in ``TASKS``, or
the fields of the reasoning-gym dataset's config. A wrong one is refused with the nearest right one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rlsys.config.schema import Row
from rlsys.errors import ConfigError
from rlsys.prompts.question import Question

EXACT_MATCH = "rlsys.reward.builtin:exact_match"
REASONING_GYM_SCORE = "rlsys.reward.builtin:reasoning_gym_score"
REASONING_GYM = "reasoning_gym."
DEFAULT_SIZE = 5000  # generated questions: the default 500 held out, and enough to train on


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Questions, and the import path of the function that scores their answers."""

    name: str
    questions: tuple[Question, ...]
    reward_path: str


def reversed_sum(*, digits: int = 2) -> tuple[Question, ...]:
    """All sums of two numbers of ``digits`` digits, the digits of question and answer reversed (least significant
    first): 12+34=46 is asked as "21+43=" and answered "64". Both orders of a sum are asked.

    Raises:
        ConfigError: ``digits`` is not 1, 2 or 3 (there are 810,000 sums of three digits).
    """
    if digits not in (1, 2, 3):
        raise ConfigError(
            what="data.task.digits", got=repr(digits), wanted="1, 2 or 3", remedy="Leave it out for two digits."
        )
    numbers = range(10 ** (digits - 1), 10**digits)
    return tuple(
        Question(content=f"{str(left)[::-1]}+{str(right)[::-1]}=", answer=str(left + right)[::-1])
        for left in numbers
        for right in numbers
    )


TASKS: Mapping[str, Callable[..., tuple[Question, ...]]] = {"reversed_sum": reversed_sum}


def scorer_path(name: str) -> str:
    """Import path of a task's own scorer. Does not make the questions."""
    return REASONING_GYM_SCORE if name.startswith(REASONING_GYM) else EXACT_MATCH


def make_task(row: Row) -> Task:
    """Make the questions of ``data.task``.

    Raises:
        ConfigError: no such task or keyword (names the nearest), a value that the task refuses, or reasoning-gym is
            not installed.
    """
    if row.name.startswith(REASONING_GYM):
        questions = _reasoning_gym(row.name.removeprefix(REASONING_GYM), row.params)
    elif row.name in TASKS:
        _check_keywords(row.params, inspect.signature(TASKS[row.name]).parameters)
        questions = TASKS[row.name](**row.params)
    else:
        raise ConfigError(
            what="data.task.name",
            got=repr(row.name),
            wanted=f"one of {', '.join(TASKS)}, or {REASONING_GYM}<dataset>",
            remedy=_nearest(row.name, TASKS),
        )
    return Task(name=row.name, questions=questions, reward_path=scorer_path(row.name))


def _reasoning_gym(dataset: str, params: dict[str, Any]) -> tuple[Question, ...]:
    """Questions of a reasoning-gym dataset.

    ``fields`` hold what scores an answer: the dataset's name, the entry as it was made (some scorers tell tuples from
    lists), and the keywords given (some scorers read limits there).
    """
    factory = _import_reasoning_gym()
    if dataset not in factory.DATASETS:
        raise ConfigError(
            what="data.task.name",
            got=f"{REASONING_GYM}{dataset}",
            wanted=f"{REASONING_GYM}<dataset> with one of reasoning-gym's {len(factory.DATASETS)} datasets",
            remedy=_nearest(dataset, factory.DATASETS),
        )
    config_class = factory.DATASETS[dataset][1]
    _check_keywords(params, [field.name for field in dataclasses.fields(config_class)])
    keywords = {"seed": 0, "size": DEFAULT_SIZE, **params}
    try:
        made = factory.create_dataset(dataset, **keywords)
        entries = [made[index] for index in range(len(made))]
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(
            what=f"data.task {REASONING_GYM}{dataset}",
            got=f"{keywords}: {error or type(error).__name__}",
            wanted=f"values that {config_class.__name__} takes",
            remedy="Correct the value, or leave the keyword out for its default.",
        ) from error
    return tuple(
        Question(
            content=entry["question"],
            answer=entry["answer"],
            fields={"rg_dataset": dataset, "rg_entry": dict(entry), "rg_config": dict(params)},
        )
        for entry in entries
    )


def _import_reasoning_gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym.factory")
    except ModuleNotFoundError as error:
        raise ConfigError(
            what="data.task.name",
            got="a reasoning-gym task, but the package reasoning-gym is not installed",
            wanted="the package reasoning-gym",
            remedy="Install it (pip install reasoning-gym), or choose another task.",
        ) from error


def _check_keywords(params: Mapping[str, Any], known: Iterable[str]) -> None:
    known = tuple(known)
    for keyword in params:
        if keyword not in known:
            raise ConfigError(
                what=f"data.task.{keyword}",
                got="an unknown keyword",
                wanted=f"one of {', '.join(known) or 'none'}",
                remedy=_nearest(keyword, known),
            )


def _nearest(wrong: str, known: Iterable[str]) -> str:
    matches = get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"Did you mean {matches[0]}?" if matches else "Choose one of those."
