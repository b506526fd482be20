"""Work dealt to ranks, and samples laid out in rows: what holds for all lengths, and figures by hand."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.batch.balance import balanced
from rlsys.batch.cost import BY_TOKENS, TokenCost
from rlsys.batch.rows import lay_out

COST = TokenCost(linear=1.0, attention=0.01)
costs = st.lists(st.integers(0, 1000).map(float), max_size=40)
lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def sums_of(costs, parts) -> list[float]:
    return [sum(costs[index] for index in pieces) for pieces in parts]


def longest_first(costs, num_parts) -> float:
    """The dearest part of the greedy rule."""
    sums = [0.0] * num_parts
    for cost in sorted(costs, reverse=True):
        sums[sums.index(min(sums))] += cost
    return max(sums)


# --- ranks


@given(costs=costs, num_parts=st.integers(1, 6))
def test_every_piece_of_work_is_dealt_exactly_once(costs, num_parts):
    parts = balanced(costs, num_parts)
    assert len(parts) == num_parts
    assert sorted(index for pieces in parts for index in pieces) == list(range(len(costs)))
    assert parts == balanced(list(costs), num_parts)


@given(costs=costs, num_parts=st.integers(1, 6))
def test_the_dearest_part_is_never_dearer_than_by_longest_first(costs, num_parts):
    dearest = max(sums_of(costs, balanced(costs, num_parts)))
    assert dearest <= longest_first(costs, num_parts)
    assert dearest <= sum(costs) / num_parts + max(costs, default=0.0) + 1e-6


@given(costs=st.lists(st.integers(1, 50).map(float), min_size=1, max_size=7), num_parts=st.integers(1, 3))
@settings(max_examples=50)
def test_the_dearest_part_is_at_most_a_third_dearer_than_the_best_that_there_is(costs, num_parts):
    ways = product(range(num_parts), repeat=len(costs))
    best = min(
        max(sum(c for c, p in zip(costs, way, strict=True) if p == part) for part in range(num_parts)) for way in ways
    )
    assert max(sums_of(costs, balanced(costs, num_parts))) <= (4 - 1 / num_parts) / 3 * best + 1e-6


def test_differences_even_out_what_longest_first_does_not():
    """8 and 7 apart, 6 with the 7, 5 with the 8, and the 4 on either: 17 and 13. By differences: 16 and 14."""
    costs = [8.0, 7.0, 6.0, 5.0, 4.0]
    assert longest_first(costs, 2) == 17.0
    assert sorted(sums_of(costs, balanced(costs, 2))) == [14.0, 16.0]


# --- rows


@given(lengths=lengths_of, more=st.integers(0, 200), attention=st.sampled_from([0.0, 0.001, 0.1]))
def test_every_sample_lies_in_one_row_and_every_microbatch_keeps_to_the_budget(lengths, more, attention):
    budget = max(lengths) + more
    cost = TokenCost(linear=1.0, attention=attention)
    layout = lay_out(lengths, budget, cost)
    assert sorted(i for rows in layout.microbatches for row in rows for i in row) == list(range(len(lengths)))
    for rows in layout.microbatches:
        assert rows and len(rows) * max(sum(lengths[i] for i in row) for row in rows) <= budget
    assert layout == lay_out(list(lengths), budget, cost)


@given(lengths=lengths_of, more=st.integers(0, 200))
def test_the_estimate_is_at_least_what_the_tokens_cost(lengths, more):
    layout = lay_out(lengths, max(lengths) + more, COST)
    assert layout.cost >= sum(COST.of(length) for length in lengths)


def test_where_only_tokens_count_short_samples_share_rows():
    layout = lay_out([10, 6, 4, 5, 5], 30, BY_TOKENS)
    assert layout.microbatches == (([0], [1, 2], [3, 4]),)
    assert layout.cost == pytest.approx(30 + 0.05 * 30)


def test_where_attention_is_dear_samples_of_like_length_have_rows_of_their_own():
    """Shared: four rows of 40, each 40 + 2 x 1,600. Alone: one row of 40 + 1,600, twelve of 10 + 100."""
    layout = lay_out([40] + [10] * 12, 160, TokenCost(linear=1.0, attention=1.0))
    assert [[len(row) for row in rows] for rows in layout.microbatches] == [[1], [1] * 12]
    assert layout.cost == pytest.approx(1640 + 12 * 110 + 2 * 0.05 * 160)
