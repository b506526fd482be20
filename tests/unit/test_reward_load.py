"""Finding a reward function: what is wrong is said before anything starts."""

import functools
import textwrap

import pytest

from rlsys.errors import ConfigError
from rlsys.records import Draw, Prompt
from rlsys.reward.builtin import exact_match, reasoning_gym_score
from rlsys.reward.load import arguments_for, check_reward, is_async_reward, load_reward
from tests.builders import make_completion

THREE = make_completion("3")


@pytest.fixture
def write(tmp_path):
    def write_module(source, name="my_reward.py"):
        (tmp_path / name).write_text(textwrap.dedent(source))
        return str(tmp_path / name)

    return write_module


def prompt(content="1+2=", **fields):
    return Prompt(draw=Draw(source="s", index=0, epoch=0), content=content, answer="3", fields=fields)


def test_function_is_found_by_module_and_by_file(write):
    assert load_reward("rlsys.reward.builtin:exact_match") is exact_match
    path = write("def score(prompt, completion, answer):\n    return len(completion)\n")
    assert load_reward(f"{path}:score")(prompt="", completion="abc", answer="") == 3


def test_relative_file_is_found_from_the_working_folder(write, monkeypatch, tmp_path):
    write("async def score(prompt, completion, answer, **fields):\n    return 0.0\n")
    monkeypatch.chdir(tmp_path)
    assert is_async_reward(load_reward("my_reward.py:score"))


def test_file_may_import_the_module_beside_it(write):
    write("BONUS = 0.25\n", name="bonus_beside_reward.py")
    path = write("from bonus_beside_reward import BONUS\ndef score(prompt, completion, answer):\n    return BONUS\n")
    assert load_reward(f"{path}:score")(prompt="", completion="", answer="") == 0.25


@pytest.mark.parametrize(
    ("source", "name", "got", "remedy"),
    [
        ("import no_such_package_here\n", "score", "No module named 'no_such_package_here' (", "missing package"),
        ("x = (\n", "score", "SyntaxError: '(' was never closed (", "Correct what the error names"),
        ("raise SystemExit(3)\n", "score", "SystemExit: 3", ""),
        ("def score_all(prompt, completion, answer): ...\n", "score_al", "no function 'score_al'", "score_all?"),
        ("score = 3\n", "score", "score is no function: 3", "no public function"),
        ("def score(prompts, completion, answer): ...\n", "score", "def score(prompts", "Rename prompts to prompt"),
        ("def score(prompt, completion, answer, /): ...\n", "score", "def score(prompt", "by keyword"),
    ],
)
def test_unusable_function_is_refused_with_reason_and_remedy(write, source, name, got, remedy):
    path = write(source)
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{path}:{name}")
    assert got in caught.value.got
    assert remedy in caught.value.remedy


def test_import_error_names_file_and_line(write):
    path = write("a = 1\nb = a.nothing\n")
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{path}:score")
    assert "AttributeError: 'int' object has no attribute 'nothing'" in caught.value.got
    assert f"({path}, line 2)" in caught.value.got


@pytest.mark.parametrize("path", ["my_reward.py", "my_reward:", ":score", "no_such_module_here:score", "/no/file.py:f"])
def test_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(ConfigError, match=r"reward\.path"):
        load_reward(path)


def test_required_argument_must_be_a_column_of_the_data():
    def score(prompt, completion, answer, test_cases, strict=True): ...

    check_reward(score, ["test_cases", "source"])
    with pytest.raises(ConfigError) as caught:
        check_reward(score, ["test_case", "source"])
    assert caught.value.got == "data with the further columns source, test_case"
    assert "Did you mean the column test_case?" in caught.value.remedy


def test_function_gets_the_columns_it_names_or_all_of_them():
    named = arguments_for(lambda prompt, completion, answer, level: 0.0, prompt(level=3, source="x"), THREE)
    assert named == {"prompt": "1+2=", "completion": "3", "answer": "3", "level": 3}
    everything = arguments_for(exact_match, prompt(level=3, source="x", completion="not the model's"), THREE)
    assert everything == {"prompt": "1+2=", "completion": "3", "answer": "3", "level": 3, "source": "x"}


def test_the_sampled_tokens_are_given_to_who_names_them_and_to_nobody_else():
    def by_tokens(prompt, completion, answer, completion_ids, turn_lengths, **fields): ...

    check_reward(by_tokens, ["level"])
    completion = make_completion("3", (7, 8), (9,))
    given = arguments_for(by_tokens, prompt(level=3, completion_ids="a column"), completion)
    assert given["completion_ids"] == [7, 8, 9] and given["turn_lengths"] == [2, 1] and given["level"] == 3
    assert "completion_ids" not in arguments_for(exact_match, prompt(level=3), completion)


def test_messages_are_copies_of_the_prompts():
    question = prompt(content=({"role": "user", "content": "1+2="},))
    given = arguments_for(exact_match, question, THREE)["prompt"]
    given[0]["content"] = "changed"
    assert question.content[0]["content"] == "1+2="


def test_async_is_seen_through_partials_and_objects():
    async def score(prompt, completion, answer, scale): ...

    class Scorer:
        async def __call__(self, prompt, completion, answer): ...

    assert is_async_reward(functools.partial(score, scale=2)) and is_async_reward(Scorer())
    assert not is_async_reward(exact_match)


def test_exact_match_ignores_white_space_around_and_nothing_else():
    assert exact_match("1+2=", " 3\n", "3") == 1.0
    assert exact_match("1+2=", "3", 3) == 1.0
    assert exact_match("1+2=", "3.", "3") == 0.0


def test_reasoning_gym_scores_the_last_tagged_answer_or_the_whole_completion():
    entry = {"question": "State 4 - 1 - 7 =", "answer": "-4", "metadata": {}}
    score = functools.partial(
        reasoning_gym_score, "", answer="-4", rg_dataset="chain_sum", rg_entry=entry, rg_config={}, level=1
    )
    assert score("so <answer>9</answer>, no: <answer> -4\n</answer> it is") == 1.0
    assert score("<answer>-4</answer> or <answer>9</answer>") == 0.0
    assert score("  -4 ") == 1.0
