"""Reward functions that come with rlsys. They are called like a user's own."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SOLUTION_MARK = "####"  # GSM8K writes its result behind it
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].])-)?"  # a minus behind a word, a number or a bracket subtracts
    r"\$?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)",  # 1,234.50 or 1234.5 or .5
    re.ASCII,
)


def exact_match(prompt: Any, completion: str, answer: Any, **fields: Any) -> float:
    """1.0 where the completion is the answer, but for white space around either; else 0.0.

    Raises ValueError where the data has no answer.
    """
    if answer is None:
        raise ValueError("the question has no answer to compare with (data.answer_key names its column)")
    return 1.0 if completion.strip() == str(answer).strip() else 0.0


def final_number(prompt: Any, completion: str, answer: Any, **fields: Any) -> float:
    """1.0 where the last number of the completion equals that of the answer, else 0.0: the score of GSM8K.

    In an answer with ``####`` the number stands behind that; in another one it is the last. Commas between thousands,
    dollar signs and a full stop at the end are no part of a number, and 18 equals 18.00.

    Raises ValueError where the answer holds no number.
    """
    wanted = last_number(str(answer).rpartition(_SOLUTION_MARK)[2])
    if wanted is None:
        raise ValueError(f"the answer {answer!r} holds no number (data.answer_key names its column)")
    return 1.0 if last_number(completion) == wanted else 0.0


def last_number(text: str) -> Decimal | None:
    """The last number in a text, exactly; None where there is none."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    return Decimal((numbers[-1]["sign"] or "") + numbers[-1]["digits"].replace(",", ""))


def reasoning_gym_score(
    prompt: Any,
    completion: str,
    answer: Any,
    *,
    rg_dataset: str,
    rg_entry: Mapping[str, Any],
    rg_config: Mapping[str, Any],
    **fields: Any,
) -> float:
    """The reasoning-gym dataset's own score of the answer, 0.0 to 1.0 (some give partial credit).

    Args:
        rg_dataset: name of the dataset.
        rg_entry: the dataset's entry that was asked (question, answer, metadata).
        rg_config: the keywords it was made with; some scorers read limits there.
    """
    score = _scorer(rg_dataset, json.dumps(rg_config, sort_keys=True))
    return float(score(tagged_answer(completion), dict(rg_entry)))


def tagged_answer(completion: str) -> str:
    """What stands in the last ``<answer>`` tag; without one the whole completion. White space around it is cut."""
    tagged = _ANSWER_TAG.findall(completion)
    return (tagged[-1] if tagged else completion).strip()


@functools.cache
def _scorer(dataset: str, config_json: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import DATASETS  # slow to import: only for its own tasks

    dataset_class, config_class = DATASETS[dataset]
    # the scorer is a method of the dataset; a dataset of one question is enough to have it
    return dataset_class(config=config_class(**{**json.loads(config_json), "size": 1})).score_answer
