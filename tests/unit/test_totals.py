"""Sums over a run: rates of its two sides, by the step and over the whole, and across a resume."""

import json

import pytest

from rlsys.controller.roster import EngineSeconds
from rlsys.controller.stats import Work, balance_metrics, pace_metrics
from rlsys.controller.totals import WINDOW_STEPS, Totals
from tests.builders import make_group

CORES = {"engine_cores": 1.0, "trainer_cores": 1.0}
GROUP = make_group(0, [[0, 0], [0, 0, 0, 0]], rewards=[0.0, 1.0])  # 2 rollouts, 6 sampled tokens


def one(in_service: float, busy: float) -> EngineSeconds:
    """Of a single engine that is there all the time, unless ``in_service`` says otherwise."""
    return EngineSeconds(in_service=in_service, busy=busy)


def sample_group(totals: Totals) -> None:
    for rollout in GROUP.rollouts:
        totals.sample(rollout)


def train(totals: Totals, *, waited_s: float, trained_s: float) -> None:
    totals.book([GROUP], [0, 0])
    totals.wait_for_batch_s += waited_s
    totals.train_s += trained_s


def test_rates_are_by_the_seconds_in_which_a_side_worked():
    work = Work(
        wall_s=10.0,
        wait_s=6.0,
        train_s=4.0,
        service_s=20.0,
        busy_s=16.0,
        made=16,
        trained=12,
        sampled_tokens=400,
        trained_tokens=240,
    )
    # two engines of one core each, busy for 8 s: a core makes 16 / 8 / 2 = 1 a second and trains 12 / 4 / 1 = 3, so
    # theta* = 1 / (1 + 3)
    assert balance_metrics(work, engine_cores=1.0, trainer_cores=1.0) == {
        "balance/engines": 2.0,
        "balance/rollouts_made_per_s": 2.0,
        "balance/rollout_tokens_per_s": 50.0,
        "balance/rollouts_trained_per_s": 3.0,
        "balance/trainer_tokens_per_s": 60.0,
        "balance/trainer_share": 0.25,
    }
    assert pace_metrics(work) == pytest.approx(
        {"balance/rollouts_per_s": 1.2, "balance/trainer_idle": 0.6, "balance/rollout_idle": 0.2}
    )


@pytest.mark.parametrize(
    ("changed", "left_out"),
    [
        ({"made": -2}, {"balance/rollouts_made_per_s", "balance/rollout_tokens_per_s"}),
        ({"busy_s": 0.0}, {"balance/rollouts_made_per_s", "balance/rollout_tokens_per_s"}),
        ({"trained": 0}, {"balance/rollouts_trained_per_s", "balance/trainer_tokens_per_s"}),
        ({"train_s": 0.0}, {"balance/rollouts_trained_per_s", "balance/trainer_tokens_per_s"}),
    ],
)
def test_a_rate_of_a_side_that_did_nothing_is_left_out_and_the_share_with_it(changed, left_out):
    sums = {
        "wall_s": 1.0,
        "wait_s": 0.0,
        "train_s": 1.0,
        "service_s": 1.0,
        "busy_s": 1.0,
        "made": 1,
        "trained": 1,
        "sampled_tokens": 1,
        "trained_tokens": 1,
    }
    names = set(balance_metrics(Work(**sums), **CORES))
    assert names - set(balance_metrics(Work(**{**sums, **changed}), **CORES)) == left_out | {"balance/trainer_share"}


def test_without_cores_of_its_own_a_side_has_rates_but_no_share():
    work = Work(
        wall_s=1.0, wait_s=0.0, train_s=1.0, service_s=1.0, busy_s=1.0, made=1, trained=1, sampled_tokens=1,
        trained_tokens=1,
    )  # fmt: skip
    metrics = balance_metrics(work, engine_cores=0.0, trainer_cores=1.0)
    assert "balance/trainer_tokens_per_s" in metrics and "balance/trainer_share" not in metrics


def test_what_lies_in_the_buffer_was_made_and_dropped_answers_count_as_sampled_tokens():
    totals = Totals()
    totals.open(100.0, one(0.0, 0.0))
    sample_group(totals)
    sample_group(totals)
    totals.sample(GROUP.rollouts[0])  # dropped later
    train(totals, waited_s=1.0, trained_s=4.0)
    metrics = totals.step_balance(105.0, one(5.0, 4.0), buffered=2, **CORES)
    assert metrics["balance/rollouts_made_per_s"] == (2 + 2) / 4
    assert metrics["balance/rollout_tokens_per_s"] == (6 + 6 + 2) / 4
    assert metrics["balance/rollouts_trained_per_s"] == 2 / 4
    assert metrics["balance/trainer_tokens_per_s"] == 6 / 4
    assert metrics["balance/trainer_idle"] == 1 / 5


def test_evaluations_before_and_after_the_training_do_not_count():
    totals = Totals()
    sample_group(totals)
    totals.open(100.0, one(9.0, 7.0))
    sample_group(totals)
    totals.close(102.0, one(11.0, 9.0))
    sample_group(totals)
    assert totals.sampled_tokens == 6


def test_a_steps_rates_are_those_of_the_last_steps_and_the_runs_those_of_all():
    totals = Totals()
    totals.open(0.0, one(0.0, 0.0))
    now = 0.0
    for trained_s in [8.0] * WINDOW_STEPS + [1.0] * WINDOW_STEPS:  # the second half is eight times as fast
        now += trained_s
        train(totals, waited_s=0.0, trained_s=trained_s)
        recent = totals.step_balance(now, one(now, now), buffered=0, **CORES)
    assert recent["balance/rollouts_trained_per_s"] == 2.0
    whole = totals.run_balance(now, one(now, now), **CORES)
    assert whole["balance/rollouts_trained_per_s"] == pytest.approx(2 * 2 / (8 + 1))


def test_a_resumed_run_goes_on_with_its_sums_and_begins_its_last_steps_anew():
    before = Totals()
    before.open(0.0, one(0.0, 0.0))
    sample_group(before)
    train(before, waited_s=0.0, trained_s=10.0)
    before.step_balance(10.0, one(10.0, 5.0), buffered=2, **CORES)
    saved = json.loads(json.dumps(before.saved(10.0, one(10.0, 5.0))))

    after = Totals.resumed(saved)
    after.open(500.0, one(0.0, 0.0))
    train(after, waited_s=0.0, trained_s=2.0)  # the group that lay in the buffer
    recent = after.step_balance(502.0, one(2.0, 1.0), buffered=2, **CORES)
    assert recent["balance/rollouts_trained_per_s"] == 2 / 2
    assert recent["balance/rollouts_made_per_s"] == 2 / 1  # one group took its place in the buffer
    whole = after.run_balance(502.0, one(2.0, 1.0), **CORES)
    assert whole["balance/rollouts_trained_per_s"] == 4 / 12
    assert whole["balance/rollouts_made_per_s"] == 6 / 6
    assert whole["balance/rollout_tokens_per_s"] == 6 / 6


def test_idle_shares_and_rates_are_right_when_engines_come_and_go():
    totals = Totals()
    totals.open(0.0, EngineSeconds(in_service=30.0, busy=20.0))
    sample_group(totals)
    # 10 s with one engine, busy half of the time, then 10 s with three of them, busy all of it
    engines = EngineSeconds(in_service=30.0 + 10 + 30, busy=20.0 + 5 + 30)
    train(totals, waited_s=0.0, trained_s=20.0)
    metrics = totals.step_balance(20.0, engines, buffered=0, **CORES)
    assert metrics["balance/engines"] == 2.0
    assert metrics["balance/rollout_idle"] == totals.summary(20.0, engines)["idle/rollout"] == 1 - 35 / 40
    assert metrics["balance/rollouts_made_per_s"] == pytest.approx(2 / (35 / 2))  # two engines are busy for 17.5 s
