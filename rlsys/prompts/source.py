"""Which question is asked next: shuffled by epoch, lost draws first, resumable exactly.

A draw is (source, index, epoch): every question is drawn once an epoch, and a draw that was lost to a fault or to
staleness is asked again as the same draw, one attempt on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from rlsys.config.schema import DataSection
from rlsys.errors import ConfigError
from rlsys.prompts.datasets import read_questions
from rlsys.prompts.question import Question, text_of
from rlsys.prompts.split import Split, hold_out, remove_held_out
from rlsys.prompts.tasks import EXACT_MATCH, make_task, scorer_path
from rlsys.records import Draw, Prompt

SPLIT_SEED = 0  # fixed: which questions are held out must not change with run.seed, or runs could not be compared
EVAL_SUFFIX = "-eval"

Cursor = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedData:
    """The questions that a ``data`` section names.

    Attributes:
        name: of the source, part of every draw: the task's name, or the training file's without suffix.
        split: training and held-out questions.
    """

    name: str
    split: Split


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """Draws of a source (law 5: what was drawn is trained, waiting, on its way, or given up; nothing else).

    Attributes:
        drawn: different draws handed out so far, or waiting to be.
        waiting: of these, lost ones that wait to be asked again.
    """

    drawn: int
    waiting: int


class PromptSource:
    """Hands out training questions, one draw at a time. Not thread-safe: the controller's loop alone draws.

    Args:
        data: the questions.
        seed: of the shuffling; every epoch has a permutation of its own.
        max_requeues: how often one draw may be asked again.
    """

    def __init__(self, data: LoadedData, *, seed: int, max_requeues: int) -> None:
        self.name = data.name
        self.num_train, self.num_eval = len(data.split.train), len(data.split.held_out)
        self._questions = data.split.train
        self._fingerprint = _fingerprint(self._questions)
        self._eval_prompts = tuple(
            _ask(question, Draw(source=f"{data.name}{EVAL_SUFFIX}", index=index, epoch=0))
            for index, question in enumerate(data.split.held_out)
        )
        self._seed, self._max_requeues = seed, max_requeues
        self._epoch, self._position = 0, 0
        self._order = self._permutation(0)
        self._requeued: deque[Prompt] = deque()

    def next(self) -> Prompt:
        """The next question to ask: the longest waiting lost draw, else the next of the epoch's permutation."""
        if self._requeued:
            return self._requeued.popleft()
        if self._position == len(self._questions):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._permutation(self._epoch)
        index = int(self._order[self._position])
        self._position += 1
        return _ask(self._questions[index], Draw(source=self.name, index=index, epoch=self._epoch))

    def requeue(self, prompt: Prompt) -> bool:
        """Ask a lost draw again, one attempt on. False where it was asked again ``max_requeues`` times already and is
        given up. Raises ValueError for a prompt that this source did not draw for training."""
        if prompt.draw.source != self.name:
            raise ValueError(f"draw {prompt.draw} is not of the source {self.name}")
        if prompt.attempt >= self._max_requeues:
            return False
        self._requeued.append(replace(prompt, attempt=prompt.attempt + 1))
        return True

    def eval_prompts(self) -> Sequence[Prompt]:
        """Every held-out question once, in a fixed order; their draws' source is named ``<name>-eval``."""
        return self._eval_prompts

    def counts(self) -> SourceCounts:
        drawn = self._epoch * len(self._questions) + self._position
        return SourceCounts(drawn=drawn, waiting=len(self._requeued))

    def draw(self, index: int, epoch: int, attempt: int) -> Prompt:
        """The question of a draw that was handed out before."""
        return replace(_ask(self._questions[index], Draw(source=self.name, index=index, epoch=epoch)), attempt=attempt)

    def cursor(self, unfinished: Sequence[Prompt] = ()) -> Cursor:
        """Where the source stands, as plain JSON; ``restore`` goes on from there.

        ``unfinished`` draws were handed out and are neither trained nor given up: the restored source asks them again,
        in their order and before everything else.
        """
        return {
            "source": self.name,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "epoch": self._epoch,
            "position": self._position,
            "requeued": [
                [prompt.draw.index, prompt.draw.epoch, prompt.attempt] for prompt in (*unfinished, *self._requeued)
            ],
        }

    def restore(self, cursor: Cursor) -> None:
        """Go on from a cursor exactly as the source that gave it would have. Raises ConfigError as ``check_cursor``."""
        self.check_cursor(cursor)
        self._epoch, self._position = cursor["epoch"], cursor["position"]
        self._order = self._permutation(self._epoch)
        self._requeued = deque(self.draw(index, epoch, attempt) for index, epoch, attempt in cursor["requeued"])

    def check_cursor(self, cursor: Cursor) -> None:
        """Raises ConfigError for a cursor of other questions or of another seed: its place means nothing here."""
        here = self.cursor()
        for part in ("source", "seed", "fingerprint"):
            if cursor[part] != here[part]:
                raise ConfigError(
                    what="the data of a resumed run",
                    got=f"{part} {here[part]!r}",
                    wanted=f"{cursor[part]!r}, as in the run that is resumed",
                    remedy="Resume with the same data section and run.seed, or start a new run.",
                )

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._questions))


def load_questions(data: DataSection) -> LoadedData:
    """Read or make the questions of a ``data`` section and split them. Neither depends on ``run.seed``.

    Raises:
        ConfigError: neither or both of ``train_path`` and ``task``, or whatever is wrong with what they name.
    """
    if (data.train_path is None) == (data.task is None):
        raise ConfigError(
            what="data",
            got="neither data.train_path nor data.task" if data.task is None else "both data.train_path and data.task",
            wanted="one of them",
            remedy="Name a JSONL or parquet file, or a generated task such as data.task={name: reversed_sum}.",
        )
    questions: Sequence[Question]
    if data.train_path is None:
        assert data.task is not None
        name, questions = data.task.name, make_task(data.task).questions
    else:
        name = data.train_path.stem
        questions = read_questions(
            data.train_path, key="data.train_path", prompt_key=data.prompt_key, answer_key=data.answer_key
        )
    if data.eval_path is None:
        return LoadedData(name=name, split=hold_out(questions, data.eval_questions, SPLIT_SEED))
    held_out = read_questions(
        data.eval_path, key="data.eval_path", prompt_key=data.prompt_key, answer_key=data.answer_key
    )
    return LoadedData(name=name, split=remove_held_out(questions, held_out))


def open_source(data: DataSection, seed: int) -> PromptSource:
    """The source of a ``data`` section, shuffled by ``seed`` (``run.seed``). Errors as of ``load_questions``."""
    return PromptSource(load_questions(data), seed=seed, max_requeues=data.max_requeues)


def default_reward_path(data: DataSection) -> str:
    """Import path of the reward function where ``reward.path`` is null: the task's own, or exact match for files."""
    return EXACT_MATCH if data.task is None else scorer_path(data.task.name)


def _ask(question: Question, draw: Draw) -> Prompt:
    return Prompt(draw=draw, content=question.content, answer=question.answer, fields=question.fields)


def _fingerprint(questions: Sequence[Question]) -> str:
    """Changes with the questions or their order."""
    digest = blake2b(digest_size=8)
    for question in questions:
        digest.update(text_of(question.content).encode() + b"\0")
    return digest.hexdigest()
