"""Which questions are asked: files, tasks, the held-out split, and the source's order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.schema import DataSection, Row
from rlsys.errors import ConfigError
from rlsys.prompts.datasets import read_questions
from rlsys.prompts.question import Question, question_key
from rlsys.prompts.source import LoadedData, PromptSource, default_reward_path, load_questions, open_source
from rlsys.prompts.split import Split, hold_out
from rlsys.prompts.tasks import make_task


def source_of(num_questions: int, seed: int = 0, max_requeues: int = 2) -> PromptSource:
    train = tuple(Question(content=f"question {index}", answer=index) for index in range(num_questions))
    split = Split(train=train, held_out=(Question(content="held out", answer=-1),))
    return PromptSource(LoadedData(name="toy", split=split), seed=seed, max_requeues=max_requeues)


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Order


@given(num_questions=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_every_epoch_draws_every_question_exactly_once(num_questions: int, seed: int) -> None:
    source = source_of(num_questions, seed)
    for epoch in range(3):
        draws = [source.next().draw for _ in range(num_questions)]
        assert sorted(draw.index for draw in draws) == list(range(num_questions))
        assert {(draw.source, draw.epoch) for draw in draws} == {("toy", epoch)}


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def epochs(seed: int) -> list[int]:
        source = source_of(30, seed)
        return [source.next().draw.index for _ in range(60)]

    assert epochs(0)[:30] != epochs(0)[30:] != epochs(1)[30:] != epochs(1)[:30]
    assert epochs(0) == epochs(0)


@given(
    num_questions=st.integers(1, 12),
    acts=st.lists(st.sampled_from(["next", "lose newest", "lose oldest"]), max_size=60),
    cut=st.integers(0, 60),
)
def test_a_restored_source_goes_on_exactly_as_the_one_it_was_taken_from(
    num_questions: int, acts: list[str], cut: int
) -> None:
    def act(source: PromptSource, drawn: list[Any], what: str) -> object:
        if what == "next" or not drawn:
            drawn.append(source.next())
            return drawn[-1]
        return source.requeue(drawn.pop(-1 if what == "lose newest" else 0))

    source = source_of(num_questions)
    drawn: list[Any] = []
    for what in acts[:cut]:
        act(source, drawn, what)
    restored, drawn_too = source_of(num_questions), list(drawn)
    restored.restore(json.loads(json.dumps(source.cursor())))
    for what in [*acts[cut:], *["next"] * (2 * num_questions)]:
        assert act(source, drawn, what) == act(restored, drawn_too, what)
    assert source.cursor() == restored.cursor()


def test_lost_draws_are_asked_first_as_the_same_draw_and_given_up_after_the_bound() -> None:
    source = source_of(5, max_requeues=2)
    first, second = source.next(), source.next()
    assert source.requeue(second) and source.requeue(first)
    again = source.next()
    assert (again.draw, again.attempt, again.content) == (second.draw, 1, second.content)
    assert source.next().draw == first.draw
    assert source.requeue(again)
    last = source.next()
    assert (last.draw, last.attempt) == (second.draw, 2)
    assert not source.requeue(last)
    assert source.next().draw not in (first.draw, second.draw)


def test_held_out_prompts_are_draws_of_their_own_source_and_are_never_requeued() -> None:
    source = source_of(3)
    (prompt,) = source.eval_prompts()
    assert (str(prompt.draw), prompt.content, prompt.answer) == ("toy-eval:0:0", "held out", -1)
    with pytest.raises(ValueError, match="toy-eval"):
        source.requeue(prompt)


def test_a_cursor_of_other_questions_is_refused() -> None:
    cursor = source_of(4).cursor()
    with pytest.raises(ConfigError, match="fingerprint"):
        source_of(5).restore(cursor)
    with pytest.raises(ConfigError, match="seed 1"):
        source_of(4, seed=1).restore(cursor)


# Split


def test_a_question_is_its_multiset_of_words_numbers_and_symbols() -> None:
    assert question_key("12+34=") == question_key("34 + 12 =")
    assert question_key("What is 3.5 plus 2?") == question_key("What is 2 plus 3.5?")
    assert question_key(({"role": "user", "content": "12+34="},)) == question_key("12+34=")
    assert question_key("12+34=") != question_key("13+24=")
    assert question_key("1+1+2=") != question_key("1+2+2=")
    assert question_key("12+34=") != question_key("12*34=")


@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=60), data=st.data())
def test_training_and_held_out_questions_share_no_key(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    questions = [Question(content=f"{left}+{right}=", answer=left + right) for left, right in pairs]
    num_eval = data.draw(st.integers(1, len(pairs)))
    try:
        split = hold_out(questions, num_eval, seed=0)
    except ConfigError:
        assert len({question_key(question.content) for question in questions}) <= num_eval
        return
    keys_of = [{question_key(question.content) for question in side} for side in (split.train, split.held_out)]
    assert split.train and not keys_of[0] & keys_of[1]
    assert len(split.held_out) >= num_eval
    assert len(split.train) + len(split.held_out) == len(questions)


def test_the_split_of_reversed_sums_is_exact_and_larger_ones_contain_smaller_ones() -> None:
    questions = make_task(Row(name="reversed_sum")).questions
    small, large = hold_out(questions, 500, seed=0), hold_out(questions, 2000, seed=0)
    assert (len(small.held_out), len(large.held_out), len(large.train)) == (500, 2000, 6100)
    assert {q.content for q in small.held_out} < {q.content for q in large.held_out}
    backwards = hold_out(questions[::-1], 500, seed=0)
    assert set(q.content for q in backwards.held_out) == {q.content for q in small.held_out}


def test_too_few_distinct_questions_are_refused() -> None:
    same = [Question(content=text, answer=3) for text in ("1+2=", "2+1=", "1 + 2 =")]
    with pytest.raises(ConfigError, match="3 questions, 1 of them distinct"):
        hold_out(same, 1, seed=0)


def test_training_questions_that_the_held_out_file_asks_are_removed_and_counted(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "sums.jsonl", *({"prompt": f"{n}+1=", "answer": n + 1} for n in range(5)))
    held_out = write_jsonl(
        tmp_path / "held_out.jsonl", {"prompt": "1+3=", "answer": 4}, {"prompt": "1+9=", "answer": 10}
    )
    loaded = load_questions(DataSection(train_path=train, eval_path=held_out))
    assert loaded.name == "sums"
    assert [question.content for question in loaded.split.train] == ["0+1=", "1+1=", "2+1=", "4+1="]
    assert loaded.split.num_removed == 1 and len(loaded.split.held_out) == 2
    with pytest.raises(ConfigError, match=r"data\.eval_path"):
        load_questions(DataSection(train_path=train, eval_path=train))


# Files


def test_jsonl_and_parquet_give_the_same_questions(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2="}]
    rows = [{"question": messages, "answer": "3", "level": 1}, {"question": messages[1:], "answer": None, "level": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    write_jsonl(tmp_path / "data.jsonl", *rows)
    read = [read_questions(tmp_path / f"data.{kind}", key="k", prompt_key="question") for kind in ("parquet", "jsonl")]
    assert read[0] == read[1]
    assert read[0][0] == Question(content=tuple(messages), answer="3", fields={"level": 1})
    assert read[0][1].answer is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": \n', "line 3\n  got:    no JSON"),
        ('{"prompt": ' + "[" * 100_000, "line 1\n  got:    no JSON: maximum recursion depth"),
        ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "line 1\n  got:    no JSON: Exceeds the limit"),
        ("\n\n", "got:    no questions"),
        ('{"prompt": "a"}\n[1]\n', "line 2\n  got:    a JSON list"),
        ('{"question": "a", "answer": 1}\n', "line 1\n  got:    the columns question, answer"),
        ('{"prompt": 5}\n', "line 1\n  got:    'prompt' holds int 5"),
        ('{"prompt": " "}\n', "line 1\n  got:    'prompt' holds str ' '"),
        ('{"prompt": "\\ud800"}\n', "line 1\n  got:    'prompt' holds str '\\ud800'"),  # half a character
        ('{"prompt": [{"role": "user"}]}\n', "line 1\n  got:    'prompt' holds list"),
        ('{"prompt": "a", "completion": "b"}\n', "line 1\n  got:    a further column 'completion'"),
    ],
)
def test_a_broken_file_is_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_questions(path, key="data.train_path")
    assert str(error.value).startswith(f"data.train_path: {path}")
    assert message in str(error.value)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_questions(tmp_path / "none.jsonl", key="data.train_path")
    (tmp_path / "data.csv").write_text("prompt\na\n")
    with pytest.raises(ConfigError, match=r"the suffix '\.csv'"):
        read_questions(tmp_path / "data.csv", key="data.train_path")
    (tmp_path / "data.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="no parquet"):
        read_questions(tmp_path / "data.parquet", key="data.train_path")


def test_an_answer_column_that_no_row_has_is_refused_where_it_was_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"prompt": "a", "solution": "b"}, {"prompt": "c", "solution": "d"})
    assert [question.answer for question in read_questions(path, key="data.train_path")] == [None, None]
    with pytest.raises(ConfigError, match="no answer in a column 'soluton'; further columns: solution"):
        read_questions(path, key="data.train_path", answer_key="soluton")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"prompt": "a"})
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root every file can be read
    with pytest.raises(ConfigError, match="no permission"):
        read_questions(path, key="data.train_path")


# Tasks


def test_reversed_sums_ask_and_answer_least_significant_digit_first() -> None:
    task = make_task(Row(name="reversed_sum"))
    answers = {question.content: question.answer for question in task.questions}
    assert (answers["21+43="], answers["99+99="], answers["01+01="]) == ("64", "891", "02")  # 46, 198, 20
    assert len(answers) == len(task.questions) == 90 * 90
    assert len(make_task(Row(name="reversed_sum", digits=1)).questions) == 9 * 9
    assert default_reward_path(DataSection(task=Row(name="reversed_sum"))) == task.reward_path


def test_a_reasoning_gym_task_carries_what_its_own_scorer_needs() -> None:
    task = make_task(Row(name="reasoning_gym.simple_equations", size=5, max_terms=3))
    again = make_task(Row(name="reasoning_gym.simple_equations", size=5, max_terms=3))
    assert task == again and len(task.questions) == 5
    from reasoning_gym.factory import get_score_answer_fn

    for question in task.questions:
        score = get_score_answer_fn(question.fields["rg_dataset"])
        assert score(question.answer, question.fields["rg_entry"]) == 1.0
        assert question.fields["rg_config"] == {"size": 5, "max_terms": 3}
        json.dumps(question.fields)


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (Row(name="reversed_sums"), "Did you mean reversed_sum?"),
        (Row(name="reversed_sum", digit=2), "Did you mean digits?"),
        (Row(name="reasoning_gym.simple_equation"), "Did you mean simple_equations?"),
        (Row(name="reasoning_gym.simple_equations", max_term=3), "Did you mean max_terms?"),
        (Row(name="reasoning_gym.simple_equations", max_terms=0), "Correct the value"),
        (Row(name="reversed_sum", digits=9), "Leave it out"),
    ],
)
def test_a_wrong_task_is_refused_with_the_nearest_right_one(row: Row, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_task(row)
    assert remedy in error.value.remedy


def test_a_data_section_names_a_file_or_a_task_not_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        load_questions(DataSection())
    with pytest.raises(ConfigError, match="both"):
        load_questions(DataSection(train_path=tmp_path / "a.jsonl", task=Row(name="reversed_sum")))


def test_the_held_out_questions_do_not_change_with_the_seed_of_the_run() -> None:
    data = DataSection(task=Row(name="reversed_sum"))
    first, second = open_source(data, seed=1), open_source(data, seed=2)
    assert first.eval_prompts() == second.eval_prompts()
    assert [first.next().draw for _ in range(5)] != [second.next().draw for _ in range(5)]
    assert (first.num_train, first.num_eval) == (7600, 500)


def test_prompts_import_neither_torch_nor_reasoning_gym() -> None:
    code = "import sys, rlsys.prompts.source; print({'torch', 'reasoning_gym', 'ray', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
