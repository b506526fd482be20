"""SHAPINGS: rewards by hand, and what holds for every row."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.rows import call_row
from rlsys.algo.segments import Segments
from rlsys.algo.shaping import SHAPINGS, cosine_length, length_penalty, overlong_penalty, repetition_penalty, truncated


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: torch.Tensor, *wanted: float) -> None:
    torch.testing.assert_close(got, doubles(*wanted), rtol=0, atol=1e-12)


def test_the_last_tokens_before_the_limit_cost_and_never_more_than_the_factor():
    lengths = torch.tensor([0, 80, 85, 100, 130])
    # over the last 20 of 100 tokens: 0, 0, 5 / 20, 20 / 20, and 50 / 20 capped at 1
    got = overlong_penalty(doubles(1, 1, 1, 1, 1), lengths, 100, buffer=20, factor=0.5)
    close(got, 1, 1, 1 - 0.5 * 5 / 20, 1 - 0.5, 1 - 0.5)


@pytest.mark.parametrize(("coef", "wanted"), [(0.0, 0.0), (0.25, 0.2), (1.0, 0.8), (-0.5, -0.5)])
def test_what_was_cut_keeps_a_share_of_its_reward_or_gets_another_one(coef, wanted):
    close(truncated(doubles(0.8, 0.8), torch.tensor([True, False]), coef=coef), wanted, 0.8)


def test_the_shortest_right_answer_gains_as_much_as_the_longest_loses_and_wrong_ones_gain_nothing():
    lengths = torch.tensor([10, 30, 20, 10, 30, 7, 7])  # a group of five, and one of equal lengths
    right = torch.tensor([True, True, True, False, False, True, False])
    got = length_penalty(doubles(1, 1, 1, 0, 0, 1, 0), lengths, right, torch.tensor([0, 5]), weight=0.4)
    # lambda = 0.5 - (length - 10) / 20: 0.5, -0.5, 0, then min(0.5, 0) and min(-0.5, 0)
    close(got, 1 + 0.4 * 0.5, 1 - 0.4 * 0.5, 1, 0, -0.4 * 0.5, 1, 0)


def test_right_answers_fall_and_wrong_ones_rise_along_half_a_cosine():
    lengths = torch.tensor([0, 50, 100, 0, 25, 200, 60])
    right = torch.tensor([True, True, True, False, False, False, True])
    cut = torch.tensor([False, False, False, False, False, False, True])
    got = cosine_length(doubles(*[9] * 7), lengths, right, cut, 100)
    quarter = (1 + math.cos(math.pi / 4)) / 2  # a wrong answer goes from -10 to 0
    close(got, 2, 1 + 1 / 2, 1, -10, -10 * quarter, 0, -10)


def repeated_share(ids: list[int], n: int) -> float:
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def penalised(rows: list[list[int]], n: int, coef: float) -> torch.Tensor:
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0)
    ids = torch.tensor([token_id for row in rows for token_id in row])
    return repetition_penalty(doubles(*[1] * len(rows)), ids, Segments(starts[:-1], len(ids)), n=n, coef=coef)


def test_repeated_n_grams_cost_their_share_and_none_reaches_into_the_next_answer():
    # pairs of 1 2 1 2 1: 12 21 12 21, half of them repeated; 1 2 3: 12 23; 2 2 2 2: 22 22 22; 5: no pair
    got = penalised([[1, 2, 1, 2, 1], [1, 2, 3], [2, 2, 2, 2], [5]], n=2, coef=0.3)
    close(got, 1 - 0.3 / 2, 1, 1 - 0.3 * 2 / 3, 1)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(1, 7))
def test_repetition_equals_counting_by_hand(rows, n):
    close(penalised(rows, n, 1.0), *(1 - repeated_share(row, n) for row in rows))


def test_long_answers_without_a_repetition_keep_their_reward_and_endless_ones_lose_it():
    rows, length = 16, 4096
    ids = torch.randint(0, 3, (rows * length,), generator=torch.Generator().manual_seed(0))
    answers = Segments(torch.arange(rows) * length, rows * length)
    got = repetition_penalty(doubles(*[0] * rows), ids, answers, n=40)
    assert bool((got == 0).all())  # 40 random ternary digits do not come twice
    assert bool((repetition_penalty(doubles(*[0] * rows), ids * 0, answers, n=40) < -0.99).all())


GROUPS = st.lists(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0]), st.integers(1, 12), st.booleans(), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=4,
)
ROWS = {
    "overlong_penalty": partial(overlong_penalty, buffer=4),
    **{name: SHAPINGS[name] for name in ("truncated", "length_penalty", "cosine_length")},
    "repetition_penalty": partial(repetition_penalty, n=2),
}


def inputs_of(groups) -> dict:
    members = [member for group in groups for member in group]
    lengths = torch.tensor([length for _, length, _, _ in members])
    sizes = torch.tensor([len(group) for group in groups])
    return {
        "rewards_S": doubles(*(reward for reward, _, _, _ in members)),
        "lengths_S": lengths,
        "correct_S": torch.tensor([right for _, _, right, _ in members]),
        "truncated_S": torch.tensor([cut for _, _, _, cut in members]),
        "group_starts_G": sizes.cumsum(0) - sizes,
        "answer_ids_N": torch.cat([torch.arange(length) % 3 for length in lengths.tolist()]),
        "answers": Segments(lengths.cumsum(0) - lengths, int(lengths.sum())),
        "max_tokens": 12,
    }


def test_every_row_is_among_those_whose_properties_are_checked():
    assert set(ROWS) == set(SHAPINGS)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=30)
@given(groups=GROUPS)
def test_a_group_is_shaped_alone_as_among_others(name, groups):
    together = call_row(ROWS[name], inputs_of(groups))
    alone = torch.cat([call_row(ROWS[name], inputs_of([group])) for group in groups])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "idle",
    [
        partial(overlong_penalty, buffer=4, factor=0.0),
        partial(truncated, coef=1.0),
        partial(length_penalty, weight=0.0),
        partial(repetition_penalty, coef=0.0),
    ],
)
@settings(max_examples=20)
@given(groups=GROUPS)
def test_a_row_without_weight_changes_nothing(idle, groups):
    inputs = inputs_of(groups)
    torch.testing.assert_close(call_row(idle, inputs), inputs["rewards_S"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "row",
    [
        partial(overlong_penalty, buffer=0),
        partial(overlong_penalty, buffer=4, factor=-1.0),
        partial(truncated, coef=1.5),
        partial(length_penalty, weight=-1.0),
        partial(repetition_penalty, n=0),
        partial(repetition_penalty, coef=-1.0),
    ],
)
def test_a_parameter_out_of_range_is_refused(row):
    with pytest.raises(AssertionError):
        call_row(row, inputs_of([[(1.0, 3, True, False)]]))
