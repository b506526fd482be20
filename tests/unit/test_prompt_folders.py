"""Questions from folders: what the ``datasets`` library writes, and plain folders of files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlsys.config.schema import DataSection
from rlsys.errors import ConfigError
from rlsys.prompts.datasets import read_questions
from rlsys.prompts.source import load_questions

Rows = Sequence[Mapping[str, Any]]


def save_dataset(folder: Path, shards: Sequence[Rows], split: str | None = "train") -> Path:
    """Write a folder as ``Dataset.save_to_disk`` does: Arrow streams of small record batches, and two JSON files."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist([row for shard in shards for row in shard])
    names = [f"data-{index:05d}-of-{len(shards):05d}.arrow" for index in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(pa.Table.from_pylist(list(rows), schema=table.schema), max_chunksize=2)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "9a3c1f6e2b7d4805",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    features = {name: {"dtype": str(table.schema.field(name).type), "_type": "Value"} for name in table.column_names}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    return folder


def save_dataset_dict(folder: Path, **splits: Rows) -> Path:
    """Write a folder as ``DatasetDict.save_to_disk`` does."""
    for split, rows in splits.items():
        save_dataset(folder / split, [rows], split)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def rows_of(*names: str) -> list[dict[str, Any]]:
    return [{"question": name, "answer": f"#### {index}", "level": index} for index, name in enumerate(names)]


def asked(path: Path, key: str = "data.train_path") -> list[Any]:
    return [question.content for question in read_questions(path, key=key, prompt_key="question")]


def refusal(path: Path, key: str = "data.train_path", prompt_key: str = "question") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_questions(path, key=key, prompt_key=prompt_key)
    assert caught.value.what.startswith(f"{key}: {path}") and caught.value.wanted and caught.value.remedy
    return caught.value


def test_a_saved_dataset_is_read_in_the_order_that_its_state_lists(tmp_path):
    folder = save_dataset(tmp_path / "saved", [rows_of("a", "b", "c"), rows_of("d"), rows_of("e")])
    assert asked(folder) == ["a", "b", "c", "d", "e"]
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert asked(folder) == ["e", "d", "a", "b", "c"]


def test_a_saved_dataset_gives_the_questions_that_a_file_of_the_same_rows_gives(tmp_path):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2="}]
    rows = [{"question": messages, "answer": "3", "level": 1}, {"question": messages[1:], "answer": None, "level": 2}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = save_dataset(tmp_path / "saved", [rows])
    of_file, of_folder = (
        read_questions(path, key="data.train_path", prompt_key="question") for path in (tmp_path / "data.jsonl", saved)
    )
    assert of_folder == of_file and of_folder[0].fields == {"level": 1}


def test_a_file_of_a_saved_dataset_can_be_named_itself(tmp_path):
    folder = save_dataset(tmp_path / "saved", [rows_of("a"), rows_of("b")])
    assert asked(folder / "data-00001-of-00002.arrow") == ["b"]


def test_of_several_splits_each_path_takes_its_own(tmp_path):
    folder = save_dataset_dict(tmp_path / "d", validation=rows_of("v"), test=rows_of("t"), train=rows_of("a", "b"))
    assert asked(folder) == ["a", "b"]
    assert asked(folder, "data.eval_path") == ["t"]
    assert asked(folder / "validation", "data.eval_path") == ["v"]
    without_test = save_dataset_dict(tmp_path / "e", train=rows_of("a"), validation=rows_of("v"))
    assert asked(without_test, "data.eval_path") == ["v"]
    data = load_questions(DataSection(train_path=folder, eval_path=folder, prompt_key="question"))
    assert ([q.content for q in data.split.train], [q.content for q in data.split.held_out]) == (["a", "b"], ["t"])


def test_a_folder_without_the_split_is_refused_with_those_it_has(tmp_path):
    folder = save_dataset_dict(tmp_path / "d", hard=rows_of("a"), easy=rows_of("b"))
    error = refusal(folder)
    assert (error.got, error.wanted) == ("the splits hard, easy", "a split called train")
    assert str(folder / "hard") in error.remedy
    assert refusal(folder, "data.eval_path").wanted == "a split called test or validation"


def test_a_plain_folder_is_one_split_in_the_order_of_its_names(tmp_path):
    for name, rows in (("0001.parquet", rows_of("c")), ("0000.parquet", rows_of("a", "b"))):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.parquet").write_text("not data")
    assert asked(tmp_path) == asked(tmp_path, "data.eval_path") == ["a", "b", "c"]


def test_a_plain_folder_of_several_splits_is_divided_by_the_names_of_its_files(tmp_path):
    names = ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001")
    for name in names:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows_of(name)), tmp_path / f"{name}.parquet")
    assert asked(tmp_path) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert asked(tmp_path, "data.eval_path") == ["test-00000-of-00001"]
    (tmp_path / "more.jsonl").write_text('{"question": "of which split?"}\n')
    error = refusal(tmp_path)
    assert error.got == "more.jsonl, whose name tells no split, among files of test, train"


@pytest.mark.parametrize(
    ("break_it", "got"),
    [
        (
            lambda folder: (folder / "data-00000-of-00001.arrow").write_bytes(b""),
            "00001.arrow\n  got:    no Arrow stream",
        ),
        (lambda folder: (folder / "data-00000-of-00001.arrow").write_text("x" * 99), "no Arrow stream"),
        (lambda folder: (folder / "data-00000-of-00001.arrow").unlink(), "00001.arrow\n  got:    no such file"),
        (lambda folder: (folder / "state.json").write_text("{"), "state.json\n  got:    no JSON"),
        (lambda folder: (folder / "state.json").write_text("{}"), "no list '_data_files'"),
        (lambda folder: (folder / "state.json").write_text('{"_data_files": ["a"]}'), "'_data_files': list ['a']"),
    ],
)
def test_a_saved_dataset_with_a_broken_part_is_refused_with_the_part(tmp_path, break_it, got):
    folder = save_dataset(tmp_path / "saved", [rows_of("a")])
    break_it(folder)
    assert got in str(refusal(folder))


def test_a_shard_cut_short_is_refused(tmp_path):
    folder = save_dataset(tmp_path / "saved", [rows_of(*("question",) * 500)])
    shard = folder / "data-00000-of-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-700])
    assert f"{shard}\n  got:    no Arrow stream" in str(refusal(folder))


def test_a_saved_dataset_without_questions_is_refused(tmp_path):
    folder = save_dataset(tmp_path / "saved", [rows_of("a"), []])
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": state["_data_files"][1:]}))
    assert refusal(folder).got == "no questions"


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert "a folder without data" in refusal(tmp_path).got


def test_a_missing_prompt_column_is_told_with_the_row_and_the_nearest_name(tmp_path):
    folder = save_dataset(tmp_path / "saved", [rows_of("a")])
    error = refusal(folder, prompt_key="qestion")
    assert error.what.endswith("arrow, row 1") and error.got == "the columns question, answer, level"
    assert "data.prompt_key=question" in error.remedy
    assert "data.prompt_key=question" in refusal(folder, prompt_key="prompt").remedy  # the first that holds text


def test_a_prompt_column_of_the_wrong_type_is_told_with_the_row(tmp_path):
    error = refusal(save_dataset(tmp_path / "saved", [rows_of("a"), rows_of("b")]), prompt_key="level")
    assert error.what.endswith("data-00000-of-00002.arrow, row 1") and error.got == "'level' holds int 0"
