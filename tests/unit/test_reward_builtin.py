"""Rewards that come with rlsys."""

import importlib.util
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.reward.builtin import exact_match, final_number, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He earns $1,234.50.", "1234.50"),
        ("18 - 3 = 15 eggs, so 15 * 2 = 30", "30"),
        ("The answer is 42.", "42"),
        ("#### 1,234,567", "1234567"),
        ("it falls to -3 degrees", "-3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("10-5", "5"),  # subtracted, not negative
        ("f(x)-2", "2"),
        ("pick 12,34", "34"),  # no thousands
        ("**72**", "72"),
        ("\\boxed{72}", "72"),
        ("it is .5", "0.5"),
        ("٣", None),  # a digit, but not of these
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@given(before=st.text(alphabet="ab .,$\n"), number=st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_a_number_is_read_exactly_however_it_is_written(before: str, number: Decimal) -> None:
    assert last_number(f"{before} {number:f}") == number
    assert last_number(f"{before} {number:,f}.") == number


GSM8K_ANSWER = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("48 + 24 = 72 clips.", 1.0),
        ("She sold $72.00", 1.0),
        ("#### 72", 1.0),
        ("72 clips, of which 24 in May", 0.0),
        ("720", 0.0),
        ("-72", 0.0),
        ("seventy-two", 0.0),
        ("", 0.0),
    ],
)
def test_the_final_number_is_compared_with_the_one_behind_the_mark(completion, score):
    assert final_number("How many?", completion, GSM8K_ANSWER, level=1) == score


def test_answers_without_a_mark_or_as_numbers_serve_as_well():
    assert final_number("?", "it is 1,000", "1000") == final_number("?", "0.5", 0.5) == final_number("?", "7", 7) == 1.0


@pytest.mark.parametrize("answer", [None, "", "no number #### here"])
def test_an_answer_without_a_number_is_an_error_and_no_zero(answer):
    with pytest.raises(ValueError, match=r"data\.answer_key"):
        final_number("?", "5", answer)


def test_a_missing_answer_is_an_error_and_no_zero():
    with pytest.raises(ValueError, match=r"data\.answer_key"):
        exact_match("?", "None", None)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is no dependency")
@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("So the sum is $\\boxed{\\frac{1}{2}}$.", "0.5", 1.0),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        ("\\boxed{3}", "4", 0.0),
        ("I do not know", "4", 0.0),
    ],
)
def test_mathematics_is_compared_by_value(completion, answer, score):
    from rlsys.reward.math_answer import math_verify_score

    assert math_verify_score("?", completion, answer) == score
