"""Reward functions that come with rlsys. They are called like a user's own."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def exact_match(prompt: Any, completion: str, answer: Any, **fields: Any) -> float:
    """1.0 where the completion is the answer, but for white space around either; else 0.0."""
    return 1.0 if completion.strip() == str(answer).strip() else 0.0


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
