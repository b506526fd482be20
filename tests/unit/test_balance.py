"""The split of a run's cores: worked examples, and what holds for every pair of rates."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.controller.stats import Work, balance_metrics
from rlsys.plan.balance import (
    Bottleneck,
    Side,
    balanced,
    by_doubling,
    in_whole_cores,
    split_of,
    synchronous_rollouts_per_s,
)

RATES = st.floats(0.01, 1000.0)
CORES = st.floats(0.25, 64.0)
DOUBLINGS = st.floats(1.2, 2.0)


@st.composite
def sides(draw: st.DrawFn) -> tuple[Side, Side]:
    rollout, trainer = (
        Side(rollouts_per_s=draw(RATES), cores=draw(CORES), scaling=by_doubling(draw(DOUBLINGS))) for _ in range(2)
    )
    return rollout, trainer


def test_the_faster_side_waits_for_the_other_one():
    # 10 rollouts a second are made and 40 could be trained: the trainer works a quarter of the time
    split = split_of(
        Side(rollouts_per_s=10.0, cores=1.0),
        Side(rollouts_per_s=40.0, cores=1.0),
        trainer_cores=1.0,
        rollout_cores=1.0,
    )
    assert split.bottleneck is Bottleneck.ROLLOUT
    assert (split.trainer_idle, split.rollout_idle) == (0.75, 0.0)
    assert split.step_s(80) == 8.0


def test_proportional_rates_are_balanced_where_the_slower_side_has_more_cores():
    # a core makes 10 a second or trains 30: of 8 cores the trainer gets 10 / (10 + 30), which is 2, and both do 60
    rollout, trainer = Side(rollouts_per_s=40.0, cores=4.0), Side(rollouts_per_s=120.0, cores=4.0)
    best = balanced(rollout, trainer, 8.0)
    assert best.trainer_share == pytest.approx(0.25)
    assert best.rollouts_per_s == pytest.approx(60.0)
    present = split_of(rollout, trainer, trainer_cores=4.0, rollout_cores=4.0)
    assert best.rollouts_per_s / present.rollouts_per_s == pytest.approx(1.5)
    assert best.bottleneck is Bottleneck.NEITHER


def test_taking_turns_is_as_fast_as_the_balanced_split_where_rates_are_proportional():
    # 80 rollouts: 1 s to make them with all 8 cores, 1/3 s to train them
    rollout, trainer = Side(rollouts_per_s=10.0, cores=1.0), Side(rollouts_per_s=30.0, cores=1.0)
    assert synchronous_rollouts_per_s(rollout, trainer, 8.0) == pytest.approx(80 / (1 + 1 / 3))


def test_working_at_once_gains_where_a_second_core_adds_little():
    # a second core adds nothing to generation and 70% to training: turns take 1/10 + 1/17 s, both at once 1/10 s
    rollout = Side(rollouts_per_s=10.0, cores=1.0, scaling=by_doubling(1.0))
    trainer = Side(rollouts_per_s=10.0, cores=1.0, scaling=by_doubling(1.7))
    assert synchronous_rollouts_per_s(rollout, trainer, 2.0) == pytest.approx(1 / (1 / 10 + 1 / 17))
    at_once = split_of(rollout, trainer, trainer_cores=1.0, rollout_cores=1.0)
    assert at_once.rollouts_per_s / synchronous_rollouts_per_s(rollout, trainer, 2.0) == pytest.approx(1 + 10 / 17)


def test_a_rate_with_twice_the_cores_is_the_factor_times_as_high():
    side = Side(rollouts_per_s=5.0, cores=3.0, scaling=by_doubling(1.5))
    assert [side.rate(cores) for cores in (3.0, 6.0, 12.0)] == pytest.approx([5.0, 7.5, 11.25])


def test_a_side_that_no_core_speeds_up_leaves_nothing_to_balance():
    rollout = Side(rollouts_per_s=10.0, cores=1.0, scaling=by_doubling(1.0))
    best = balanced(rollout, Side(rollouts_per_s=1.0, cores=1.0), 4.0)
    assert best.bottleneck is Bottleneck.TRAINER
    assert best.trainer_share == pytest.approx(1.0)
    whole = in_whole_cores(rollout, Side(rollouts_per_s=1.0, cores=1.0), 4.0)
    assert whole is not None and whole.trainer_cores == 3


@given(pair=sides(), cores=CORES, share=st.floats(0.001, 0.999))
def test_no_split_is_faster_than_the_balanced_one(pair, cores, share):
    best = balanced(*pair, cores)
    other = split_of(*pair, trainer_cores=share * cores, rollout_cores=(1 - share) * cores)
    assert other.rollouts_per_s <= best.rollouts_per_s * (1 + 1e-6)


@given(pair=sides(), cores=CORES)
def test_the_balanced_share_lies_between_none_and_all_and_uses_every_core(pair, cores):
    best = balanced(*pair, cores)
    assert 0 < best.trainer_share < 1
    assert best.trainer_cores + best.rollout_cores == pytest.approx(cores)


@given(pair=sides(), cores=CORES)
def test_both_sides_are_equally_fast_at_the_balanced_share(pair, cores):
    best = balanced(*pair, cores)
    if 1e-6 < best.trainer_share < 1 - 1e-6:  # nearer to an end the shares of float64 are too coarse to compare rates
        assert best.made_per_s == pytest.approx(best.trained_per_s, rel=1e-6)


@given(pair=sides(), cores=CORES)
def test_taking_turns_is_never_faster_than_the_balanced_split(pair, cores):
    assert synchronous_rollouts_per_s(*pair, cores) <= balanced(*pair, cores).rollouts_per_s * (1 + 1e-6)


@given(pair=sides(), cores=st.floats(2.0, 40.0))
def test_no_split_into_whole_cores_is_faster_than_the_chosen_one(pair, cores):
    chosen = in_whole_cores(*pair, cores)
    every = [
        split_of(*pair, trainer_cores=number, rollout_cores=cores - number).rollouts_per_s
        for number in range(1, math.floor(cores))
    ]
    assert chosen is not None and chosen.rollouts_per_s == max(every)


def test_fewer_than_two_cores_cannot_be_divided_into_whole_ones():
    side = Side(rollouts_per_s=1.0, cores=1.0)
    assert in_whole_cores(side, side, 1.5) is None


@given(made=st.integers(1, 10_000), trained=st.integers(1, 10_000), rollout_cores=CORES, trainer_cores=CORES)
def test_the_share_reported_by_a_run_is_the_balanced_one_of_proportional_rates(
    made, trained, rollout_cores, trainer_cores
):
    work = Work(
        wall_s=5.0, wait_s=1.0, train_s=3.0, service_s=5.0, busy_s=4.0, made=made, trained=trained, sampled_tokens=1,
        trained_tokens=1,
    )  # fmt: skip
    reported = balance_metrics(work, engine_cores=rollout_cores, trainer_cores=trainer_cores)["balance/trainer_share"]
    rollout = Side(rollouts_per_s=made / 4.0, cores=rollout_cores)
    trainer = Side(rollouts_per_s=trained / 3.0, cores=trainer_cores)
    assert reported == pytest.approx(balanced(rollout, trainer, rollout_cores + trainer_cores).trainer_share, rel=1e-6)


@given(pair=sides(), cores=CORES)
def test_the_trainer_gets_more_where_the_engines_are_faster(pair, cores):
    rollout, trainer = pair
    shares = [
        balanced(Side(rollouts_per_s=rate, cores=rollout.cores), trainer, cores).trainer_share
        for rate in (rollout.rollouts_per_s, 2 * rollout.rollouts_per_s, 4 * rollout.rollouts_per_s)
    ]
    assert all(less <= more for less, more in pairwise(shares))


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="rate"):
        Side(rollouts_per_s=rate, cores=1.0)


@pytest.mark.parametrize("factor", [0.5, 2.5, math.nan])
def test_more_cores_neither_slow_a_side_down_nor_more_than_double_it(factor):
    with pytest.raises(ValueError, match="twice the cores"):
        by_doubling(factor)
