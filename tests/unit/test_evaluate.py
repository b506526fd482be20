import asyncio
import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.controller.evaluate import evaluate, pass_at_k
from rlsys.records import DropCause, Version
from tests.builders import make_group, make_prompt


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_correct_sample(case):
    n, correct, k = case
    subsets = list(combinations(range(n), k))
    share = sum(any(member < correct for member in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, correct, k) == pytest.approx(share)


def test_pass_at_k_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match="at least 3 samples"):
        pass_at_k(2, 1, 3)


def test_a_lost_answer_counts_neither_way():
    groups = {
        0: make_group(0, [[3], [3]], rewards=[1.0, 0.0]),
        1: make_group(1, [[2], [5]], rewards=[1.0, 1.0]).drop({"test:0:1#0/0": DropCause.REWARD_TIMEOUT}),
    }

    async def ask(prompt):
        return groups[prompt.draw.index]

    report = asyncio.run(evaluate([make_prompt(0), make_prompt(1)], ask, correct_at=1.0, pass_at=(1, 2)))
    assert report.accuracy == pytest.approx(2 / 3)
    assert (report.num_scored, report.num_lost) == (3, 1)
    assert report.pass_at == {1: pytest.approx(0.75), 2: pytest.approx(1.0)}
    assert (report.oldest, report.newest) == (Version(incarnation=0, step=3), Version(incarnation=0, step=5))


def test_an_evaluation_of_which_every_answer_was_lost_has_no_accuracy_and_not_one_of_zero():
    async def lose(prompt):
        group = make_group(prompt.draw.index, [[0], [0]])
        return group.drop({rollout.rollout_id: DropCause.REWARD_ERROR for rollout in group.rollouts})

    report = asyncio.run(evaluate([make_prompt(0), make_prompt(1)], lose, correct_at=1.0, pass_at=(1,)))
    assert math.isnan(report.accuracy) and math.isnan(report.pass_at[1])
    assert (report.num_scored, report.num_lost) == (0, 4)
