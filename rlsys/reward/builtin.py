"""Reward functions that come with rlsys. They are called like a user's own."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def exact_match(prompt: Any, completion: str, answer: Any, **fields: Any) -> float:
    """1.0 where the completion is the answer, but for white space around either; else 0.0."""
    return 1.0 if completion.strip() == str(answer).strip() else 0.0


def reasoning_gym_score(
    prompt: Any, completion: str, answer: Any, *, rg_dataset: str, rg_entry: Mapping[str, Any], **fields: Any
) -> float:
    """The reasoning-gym dataset's own score of the answer, 0.0 to 1.0 (some give partial credit).

    Args:
        rg_dataset: name of the dataset.
        rg_entry: the dataset's entry that was asked (question, answer, metadata).
    """
    return float(_scorer(rg_dataset)(tagged_answer(completion), dict(rg_entry)))


def tagged_answer(completion: str) -> str:
    """What stands in the last ``<answer>`` tag; without one the whole completion. White space around it is cut."""
    tagged = _ANSWER_TAG.findall(completion)
    return (tagged[-1] if tagged else completion).strip()


@functools.cache
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn  # optional and slow to import: only for its own tasks

    return get_score_answer_fn(dataset)
