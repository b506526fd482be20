"""Questions from files and folders: a question column, an answer column, and all other columns kept.

Files are JSONL, parquet, or Arrow streams (what the ``datasets`` library keeps on disk). A folder is one of three:

* written by ``Dataset.save_to_disk``: ``state.json`` lists its Arrow files in their order;
* written by ``DatasetDict.save_to_disk``: ``dataset_dict.json`` lists the splits, each a folder of the first kind;
* plain: files of the kinds above, with or without a split's name in theirs (``train-00000-of-00002.parquet``).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from rlsys.errors import ConfigError
from rlsys.prompts.question import Question
from rlsys.records import Message

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow",)
SUFFIXES = JSONL_SUFFIXES + PARQUET_SUFFIXES + ARROW_SUFFIXES
SPLITS = ("train", "test", "validation")
EVAL_SPLITS = ("test", "validation")  # of a folder that data.eval_path names: the first one that is there
ANSWER = "answer"  # column of the reference answer unless data.answer_key names another; this one may be missing
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half a character, which no tokenizer takes
REWARD_ARGUMENTS = ("prompt", "completion", "answer")  # of every reward function: no other column may take these names


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a value stands, for messages: the config key, the file, and the line (JSONL) or row (else), from 1."""

    key: str
    path: Path
    position: str = ""

    def error(self, got: str, wanted: str, remedy: str) -> ConfigError:
        where = f"{self.key}: {self.path}" + (f", {self.position}" if self.position else "")
        return ConfigError(what=where, got=got, wanted=wanted, remedy=remedy)


def read_questions(path: Path, *, key: str, prompt_key: str = "prompt", answer_key: str = ANSWER) -> list[Question]:
    """Read every question of a file or folder, in the order of the files and of their rows.

    Args:
        path: a ``.jsonl``, ``.parquet`` or ``.arrow`` file, or a folder as the top of this file says. Of a folder of
            several splits ``data.train_path`` gets ``train``, and ``data.eval_path`` ``test`` or else ``validation``.
        key: the config key that named it.
        prompt_key: column of the question: text, or a list of ``{"role", "content"}`` messages.
        answer_key: column of the reference answer; where a row has none its answer is None.

    Raises:
        ConfigError: no such file, another kind of file, broken contents, no question in it, or a question of the wrong
            type; with the file and the line or row.
    """
    whole = _Place(key=key, path=path)
    files = _files_of_folder(whole) if path.is_dir() else [whole]
    questions = [_question(place, row, prompt_key, answer_key) for file in files for place, row in _rows(file)]
    if not questions:
        raise whole.error(got="no questions", wanted="at least one", remedy="Fill the file, or name another.")
    if answer_key != ANSWER and all(question.answer is None for question in questions):
        raise whole.error(
            got=f"no answer in a column '{answer_key}'; further columns: {', '.join(questions[0].fields) or 'none'}",
            wanted="the column that data.answer_key names",
            remedy="Correct data.answer_key, or leave it out where the reward function needs no answer.",
        )
    return questions


def _rows(file: _Place) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    if not file.path.is_file():
        raise file.error(
            got="no such file" if not file.path.exists() else "no plain file",
            wanted="a JSONL, parquet or Arrow file, or a folder of them",
            remedy=f"Check the path (relative ones start from {Path.cwd()}).",
        )
    if not os.access(file.path, os.R_OK):
        raise file.error(
            got="no permission to read it", wanted="a file that can be read", remedy="Change its mode, or name another."
        )
    suffix = file.path.suffix
    if suffix in JSONL_SUFFIXES:
        return _jsonl_rows(file)
    if suffix in PARQUET_SUFFIXES:
        return _table_rows(file, "parquet", pyarrow.parquet.read_table)
    if suffix in ARROW_SUFFIXES:
        return _table_rows(file, "Arrow stream", _read_arrow_stream)
    raise file.error(
        got=f"the suffix '{suffix}'",
        wanted=f"one of {', '.join(SUFFIXES)}",
        remedy="Convert the file: one JSON object a line, or parquet.",
    )


def _files_of_folder(folder: _Place) -> list[_Place]:
    """The files of one split, in their order."""
    if (folder.path / "dataset_dict.json").is_file():
        splits = _list_in(_at(folder, "dataset_dict.json"), "splits")
        folder = _at(folder, _choose_split(folder, [str(split) for split in splits]))
    if (folder.path / "state.json").is_file():
        return _files_of_saved_dataset(folder)
    return _files_of_plain_folder(folder)


def _files_of_saved_dataset(folder: _Place) -> list[_Place]:
    state = _at(folder, "state.json")
    entries = _list_in(state, "_data_files")
    if not all(isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in entries):
        raise state.error(
            got=f"'_data_files': {_shortened(entries)}",
            wanted='a list of {"filename": ...}',
            remedy="Write the folder again with Dataset.save_to_disk.",
        )
    return [_at(folder, entry["filename"]) for entry in entries]


def _files_of_plain_folder(folder: _Place) -> list[_Place]:
    paths = sorted(path for path in folder.path.glob("[!.]*") if path.suffix in SUFFIXES)
    if not paths:
        raise folder.error(
            got="a folder without data: no dataset_dict.json, state.json, " + " or ".join(SUFFIXES) + " file in it",
            wanted="a file of questions, or a folder of such files",
            remedy="Name the folder that holds the files themselves (of one written by save_to_disk its top).",
        )
    by_split: dict[str, list[Path]] = {}
    for path in paths:
        by_split.setdefault(_split_in(path.stem), []).append(path)
    unnamed = by_split.get("", [])
    if unnamed and len(by_split) > 1:
        named = ", ".join(sorted(by_split.keys() - {""}))
        raise folder.error(
            got=f"{unnamed[0].name}, whose name tells no split, among files of {named}",
            wanted="files of one split, or a split's name in the name of every file",
            remedy="Move it away, or name one file.",
        )
    chosen = "" if unnamed else _choose_split(folder, list(by_split))
    return [_at(folder, path.name) for path in by_split[chosen]]


def _split_in(stem: str) -> str:
    """The split that a file's name tells, e.g. ``train`` of ``train-00000-of-00002``; empty where it tells none."""
    words = re.split(r"[^a-z]+", stem.lower())
    return next((split for split in SPLITS if split in words), "")


def _choose_split(folder: _Place, splits: Sequence[str]) -> str:
    wanted = EVAL_SPLITS if folder.key == "data.eval_path" else SPLITS[:1]
    for split in wanted:
        if split in splits:
            return split
    example = f", e.g. {folder.path / splits[0]}" if splits else ""
    raise folder.error(
        got=f"the splits {', '.join(splits) or 'none'}",
        wanted=f"a split called {' or '.join(wanted)}",
        remedy=f"Name the folder or file of one split{example}.",
    )


def _list_in(file: _Place, name: str) -> list[Any]:
    """The list under ``name`` in a JSON file of the ``datasets`` library."""
    try:
        tree = json.loads(file.path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got = f"no JSON: {error}"
    else:
        if isinstance(tree, dict) and isinstance(tree.get(name), list):
            return tree[name]
        got = f"no list '{name}'"
    raise file.error(
        got=got,
        wanted=f"the list '{name}' that the datasets library writes there",
        remedy="Write the folder again with save_to_disk, or name a file in it.",
    )


def _at(folder: _Place, name: str) -> _Place:
    return _Place(key=folder.key, path=folder.path / name)


def _jsonl_rows(whole: _Place) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    with whole.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = _Place(key=whole.key, path=whole.path, position=f"line {number}")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number too long, brackets too deep
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


def _table_rows(
    whole: _Place, kind: str, read: Callable[[Path], pyarrow.Table]
) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    try:
        table = read(whole.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise whole.error(
            got=f"no {kind}: {error}", wanted=f"a file that is {kind}", remedy="Write the file again, or name another."
        ) from error
    number = 0
    for batch in table.to_batches():
        for row in batch.to_pylist():
            number += 1
            yield _Place(key=whole.key, path=whole.path, position=f"row {number}"), row


def _read_arrow_stream(path: Path) -> pyarrow.Table:
    with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        return stream.read_all()


def _question(place: _Place, row: Mapping[str, Any], prompt_key: str, answer_key: str) -> Question:
    if prompt_key not in row:
        raise place.error(
            got=f"the columns {', '.join(row) or 'none'}",
            wanted=f"a column '{prompt_key}' with the question",
            remedy=f"Name the question's column: data.prompt_key={_nearest_column(row, prompt_key)}.",
        )
    fields = {column: value for column, value in row.items() if column not in (prompt_key, answer_key)}
    for column in REWARD_ARGUMENTS:
        if column in fields:
            answers = ", or name it in data.answer_key" if column == ANSWER else ""
            raise place.error(
                got=f"a further column '{column}'",
                wanted=f"columns beside question and answer named otherwise than {', '.join(REWARD_ARGUMENTS)}",
                remedy=f"Rename or remove it: reward functions get the columns by name beside these three{answers}.",
            )
    return Question(content=_content(place, row[prompt_key], prompt_key), answer=row.get(answer_key), fields=fields)


def _nearest_column(row: Mapping[str, Any], prompt_key: str) -> str:
    """The column that was probably meant: one of a similar name, else the first that could hold a question."""
    texts = [column for column, value in row.items() if isinstance(value, str | list)]
    return next(iter([*difflib.get_close_matches(prompt_key, list(row), 1), *texts, *row]), prompt_key)


def _content(place: _Place, value: Any, prompt_key: str) -> str | tuple[Message, ...]:
    if _is_text(value) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return tuple({"role": message["role"], "content": message["content"]} for message in value)
    raise place.error(
        got=f"'{prompt_key}' holds {_shortened(value)}",
        wanted='text of whole characters that is not empty, or a list of {"role": text, "content": text} messages',
        remedy="Correct or remove this question, or name another column in data.prompt_key.",
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(_is_text(message.get(part)) for part in ("role", "content"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not LONE_SURROGATE.search(value)


def _shortened(value: Any, most_characters: int = 80) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= most_characters else text[: most_characters - 3] + "..."
