"""A question as the data holds it, and what makes two questions the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsys.records import Message

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]|_")  # a number, a word, or one symbol


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question before it is drawn (a drawn one is a ``Prompt``).

    Attributes:
        content: plain text, or chat messages.
        answer: the reference answer; None where the data has none.
        fields: the other columns, handed to the reward function by name.

    Example:
        >>> question_key(Question(content="21+43=", answer="64").content)
        '+ 21 43 ='
    """

    content: str | tuple[Message, ...]
    answer: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def text_of(content: str | tuple[Message, ...]) -> str:
    """The text of a question, its messages one to a line."""
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)


def question_key(content: str | tuple[Message, ...]) -> str:
    """What makes two questions the same: the multiset of their words, numbers and symbols, upper case or lower.

    So a+b and b+a are one question. The key errs towards "the same" (a-b and b-a are one question too): on a
    held-out split that costs a training question, while the other error would let an answer leak.
    """
    return " ".join(sorted(_TOKEN.findall(text_of(content).casefold())))
