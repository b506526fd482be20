"""Questions from JSONL and parquet files: a question column, an answer column, and all other columns kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rlsys.errors import ConfigError
from rlsys.prompts.question import Question
from rlsys.records import Message

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
REWARD_ARGUMENTS = ("prompt", "completion", "answer")  # of every reward function: no other column may take these names


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a value stands, for messages: the config key, the file, and the line (JSONL) or row (parquet), from 1."""

    key: str
    path: Path
    position: str = ""

    def error(self, got: str, wanted: str, remedy: str) -> ConfigError:
        where = f"{self.key}: {self.path}" + (f", {self.position}" if self.position else "")
        return ConfigError(what=where, got=got, wanted=wanted, remedy=remedy)


def read_questions(path: Path, *, key: str, prompt_key: str = "prompt", answer_key: str = "answer") -> list[Question]:
    """Read every question of a file.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        key: the config key that named it, for messages.
        prompt_key: column of the question: text, or a list of ``{"role", "content"}`` messages.
        answer_key: column of the reference answer; where a row has none its answer is None.

    Raises:
        ConfigError: no such file, another kind of file, broken contents, no question in it, or a question of the wrong
            type; with the line or row.
    """
    whole = _Place(key=key, path=path)
    if not path.is_file():
        raise whole.error(
            got="no such file" if not path.exists() else "no plain file",
            wanted="a JSONL or parquet file",
            remedy=f"Check the path (relative ones start from {Path.cwd()}).",
        )
    if path.suffix in JSONL_SUFFIXES:
        rows = _jsonl_rows(whole)
    elif path.suffix in PARQUET_SUFFIXES:
        rows = _parquet_rows(whole)
    else:
        raise whole.error(
            got=f"the suffix '{path.suffix}'",
            wanted=f"one of {', '.join(JSONL_SUFFIXES + PARQUET_SUFFIXES)}",
            remedy="Convert the file: one JSON object a line, or parquet.",
        )
    questions = [_question(place, row, prompt_key, answer_key) for place, row in rows]
    if not questions:
        raise whole.error(got="no questions", wanted="at least one", remedy="Fill the file, or name another.")
    return questions


def _jsonl_rows(whole: _Place) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    with whole.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = _Place(key=whole.key, path=whole.path, position=f"line {number}")
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise place.error(
                    got=f"no JSON: {error}",
                    wanted="one JSON object a line",
                    remedy="Correct or remove the line (a JSON array is written as one object a line).",
                ) from error
            if not isinstance(row, dict):
                raise place.error(
                    got=f"a JSON {type(row).__name__}",
                    wanted="a JSON object",
                    remedy='Write each question as {"prompt": ..., "answer": ...} on a line of its own.',
                )
            yield place, row


def _parquet_rows(whole: _Place) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    try:
        table = pyarrow.parquet.read_table(whole.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise whole.error(
            got=f"no parquet: {error}", wanted="a parquet file", remedy="Write the file again, or name another."
        ) from error
    number = 0
    for batch in table.to_batches():
        for row in batch.to_pylist():
            number += 1
            yield _Place(key=whole.key, path=whole.path, position=f"row {number}"), row


def _question(place: _Place, row: Mapping[str, Any], prompt_key: str, answer_key: str) -> Question:
    if prompt_key not in row:
        raise place.error(
            got=f"the columns {', '.join(row) or 'none'}",
            wanted=f"a column '{prompt_key}' with the question",
            remedy="Name the question's column in data.prompt_key.",
        )
    fields = {column: value for column, value in row.items() if column not in (prompt_key, answer_key)}
    for column in REWARD_ARGUMENTS:
        if column in fields:
            raise place.error(
                got=f"a further column '{column}'",
                wanted=f"columns beside question and answer named otherwise than {', '.join(REWARD_ARGUMENTS)}",
                remedy="Rename or remove it: reward functions get the columns by name beside these three.",
            )
    return Question(content=_content(place, row[prompt_key], prompt_key), answer=row.get(answer_key), fields=fields)


def _content(place: _Place, value: Any, prompt_key: str) -> str | tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return tuple({"role": message["role"], "content": message["content"]} for message in value)
    raise place.error(
        got=f"'{prompt_key}' holds {_shortened(value)}",
        wanted='text that is not empty, or a list of {"role": text, "content": text} messages',
        remedy="Correct or remove this question, or name another column in data.prompt_key.",
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(part), str) for part in ("role", "content"))


def _shortened(value: Any, most_characters: int = 80) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= most_characters else text[: most_characters - 3] + "..."
