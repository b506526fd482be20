"""Which questions are held out. Training and held-out questions share no ``question_key``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from rlsys.errors import ConfigError
from rlsys.prompts.question import Question, question_key


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Training and held-out questions, each in the order of the data.

    Attributes:
        num_removed: training questions left out since a separate held-out file asks the same.
    """

    train: tuple[Question, ...]
    held_out: tuple[Question, ...]
    num_removed: int = 0


def hold_out(questions: Sequence[Question], num_eval: int, seed: int) -> Split:
    """Split off ``num_eval`` questions, whole keys at a time.

    Keys are tried in the order of a hash of (seed, key), so a question's side does not depend on the order of the
    data. Keys too large for the room left are passed over, hence exactly ``num_eval`` questions are held out whenever
    enough keys of one question are among the rest; otherwise the smallest key passed over is added, and more are.

    Raises:
        ConfigError: fewer questions, counted by key, than would leave one to train on.
    """
    keys = [question_key(question.content) for question in questions]
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    chosen = _choose_keys(sizes, num_eval, seed)
    if len(chosen) == len(sizes):
        raise ConfigError(
            what=f"data.eval_questions={num_eval}",
            got=f"{len(questions)} questions, {len(sizes)} of them distinct: none would be left to train on",
            wanted="more distinct questions than are held out",
            remedy="Lower data.eval_questions, give more questions, or give held-out ones in data.eval_path.",
        )
    return Split(
        train=tuple(question for question, key in zip(questions, keys, strict=True) if key not in chosen),
        held_out=tuple(question for question, key in zip(questions, keys, strict=True) if key in chosen),
    )


def remove_held_out(questions: Iterable[Question], held_out: Sequence[Question]) -> Split:
    """Leave out of the training ``questions`` all that ask the same as one of ``held_out``.

    Raises:
        ConfigError: no training question is left.
    """
    questions = tuple(questions)
    held_out_keys = {question_key(question.content) for question in held_out}
    train = tuple(question for question in questions if question_key(question.content) not in held_out_keys)
    if not train:
        raise ConfigError(
            what="data.eval_path",
            got=f"the held-out file asks all of the {len(questions)} training questions",
            wanted="training questions that are not held out",
            remedy="Give a held-out file with other questions, or leave data.eval_path out.",
        )
    return Split(train=train, held_out=tuple(held_out), num_removed=len(questions) - len(train))


def _choose_keys(sizes: dict[str, int], num_eval: int, seed: int) -> set[str]:
    chosen: set[str] = set()
    passed_over: list[str] = []
    room = num_eval
    for key in sorted(sizes, key=lambda key: blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()):
        if room == 0:
            break
        if sizes[key] <= room:
            chosen.add(key)
            room -= sizes[key]
        else:
            passed_over.append(key)
    if room > 0 and passed_over:
        chosen.add(min(passed_over, key=lambda key: sizes[key]))
    return chosen
