"""The learning rate, a function of the optimizer step."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.schema import Row, TrainSection
from rlsys.train.schedule import SCHEDULES, LearningRate, constant, cosine, learning_rate, linear, wsd

SCHEDULE = st.one_of(
    st.just(constant),
    st.builds(partial, st.sampled_from([linear, cosine]), floor=st.floats(0.0, 1.0)),
    st.builds(partial, st.just(wsd), decay_share=st.floats(0.01, 1.0), floor=st.floats(0.0, 1.0)),
)
RATES = st.builds(
    LearningRate,
    schedule=SCHEDULE,
    warmup_steps=st.integers(0, 20),
    last_steps=st.integers(1, 100),
    rewarm_steps=st.integers(0, 10),
)


def test_schedules_are_those_worked_out_by_hand():
    assert [linear(step, 4) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [linear(step, 4, floor=0.2) for step in (0, 2, 4)] == pytest.approx([1.0, 0.6, 0.2])
    assert [cosine(step, 4) for step in range(5)] == pytest.approx([1.0, 0.8535533906, 0.5, 0.1464466094, 0.0])
    assert cosine(2, 4, floor=0.1) == pytest.approx(0.55)
    # ten steps, the last four of them down
    assert [wsd(step, 10, decay_share=0.4) for step in range(10)] == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [constant(step) for step in (0, 1000)] == [1.0, 1.0]


def test_a_warm_up_rises_in_a_line_and_the_schedule_has_the_steps_after_it():
    rate = LearningRate(schedule=linear, warmup_steps=4, last_steps=8)
    assert [rate.factor(step) for step in range(9)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_policys_rate_ends_with_the_last_step_of_the_last_batch_that_trains_it():
    train = TrainSection(warmup_steps=2, steps_per_batch=3, schedule=Row(name="wsd", decay_share=0.5, floor=0.5))
    rate = learning_rate(train, batches=2)
    assert [rate.factor(step) for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75]


def test_a_rate_rises_again_after_a_resume_where_that_is_asked_for():
    rate = LearningRate(rewarm_steps=4)
    assert [rate.factor(step, 10) for step in range(10, 15)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [LearningRate().factor(step, 10) for step in (10, 11)] == [1.0, 1.0]


def test_a_run_that_is_made_longer_in_its_decay_goes_on_in_the_stable_phase():
    short, long = (LearningRate(schedule=wsd, warmup_steps=5, last_steps=steps) for steps in (50, 200))
    assert [short.factor(step) for step in range(41)] == [long.factor(step) for step in range(41)]
    assert short.factor(49) < 0.2 and long.factor(50) == 1.0


@given(rate=RATES, step=st.integers(0, 150), resumed_at=st.one_of(st.none(), st.integers(0, 150)))
def test_a_factor_is_never_negative_and_never_above_the_peak(rate, step, resumed_at):
    factor = rate.factor(step, None if resumed_at is None else min(step, resumed_at))
    assert 0.0 <= factor <= 1.0


@given(rate=RATES)
def test_a_rate_never_falls_before_the_end_of_its_warm_up_and_never_rises_after_it(rate):
    factors = [rate.factor(step) for step in range(rate.warmup_steps + rate.last_steps + 5)]
    top = max(0, rate.warmup_steps - 1)
    assert factors[top] == 1.0
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@given(name=st.sampled_from(["linear", "cosine", "wsd"]), steps=st.integers(20, 200), warmup=st.integers(0, 10))
def test_a_rate_has_no_jumps(name, steps, warmup):
    """Between the end of the warm-up and the last step; the steepest is cosine, pi / 2 a step of the whole way."""
    rate = LearningRate(schedule=SCHEDULES[name], warmup_steps=warmup, last_steps=warmup + steps)
    factors = [rate.factor(step) for step in range(max(0, warmup - 1), warmup + steps + 1)]
    most = 1.0 / max(1, round(0.2 * steps)) if name == "wsd" else 1.5708 / steps
    assert all(before - after <= most + 1e-9 for before, after in zip(factors, factors[1:], strict=False))
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
