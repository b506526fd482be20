"""The reward for answers that are mathematics, compared by the math-verify library: ``reward.path:
rlsys.reward.math_answer:math_verify_score``.

A module of its own, since the library is no dependency: a run that asks for this reward where it is missing is refused
when the module is imported, before anything starts.
"""

from __future__ import annotations

from typing import Any

from math_verify import parse, verify


def math_verify_score(prompt: Any, completion: str, answer: Any, **fields: Any) -> float:
    """1.0 where the completion's final expression (in a box, in LaTeX, or plain) equals the answer, else 0.0. One that
    cannot be read is wrong.

    Args:
        answer: LaTeX, e.g. ``\\frac{1}{2}``.

    Raises:
        ValueError: the answer cannot be read.
    """
    # Its own deadlines are off: they share SIGALRM with reward.timeout_s, and would switch that off.
    wanted = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not wanted:
        raise ValueError(f"the answer {answer!r} is no mathematics (data.answer_key names its column)")
    given = parse(completion, parsing_timeout=None)
    return 1.0 if verify(wanted, given, timeout_seconds=None) else 0.0
