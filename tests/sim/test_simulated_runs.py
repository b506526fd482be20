"""The real loops on virtual time: laws 1, 2 and 8 over whole runs, with and without faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from rlsys.buffer.staleness import staleness_of
from rlsys.errors import FleetLost, LawBroken
from rlsys.records import DropCause
from rlsys.sim.world import SimReport, World, simulate


def check_laws(report: SimReport, world: World) -> None:
    ledger = report.loops.ledger
    assert ledger.submitted == ledger.trained + ledger.dropped.total() and ledger.lead == 0
    assert [step for step, _ in report.trained] == list(range(world.steps))
    for step, groups in report.trained:
        assert len(groups) == world.prompts_per_batch
        ages = staleness_of(groups, step)
        assert min(ages) >= 0 and max(ages) <= world.max_staleness
    draws = Counter(group.prompt.draw for _, groups in report.trained for group in groups)
    assert set(draws.values()) == {1}, "a draw was trained twice"


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_every_rollout_is_accounted_for_and_young_enough(max_staleness):
    world = World(max_staleness=max_staleness)
    report = simulate(world)
    check_laws(report, world)
    assert report.loops.ledger.dropped.total() == 0
    assert len(report.sink.steps) == world.steps


def test_staleness_zero_trains_only_what_the_very_policy_sampled():
    report = simulate(World(max_staleness=0))
    summary = report.summary
    assert summary["staleness/max"] == 0
    # synchronous: at any moment either the engines or the learner stand still
    assert summary["idle/rollout"] > 0.3


def test_asynchronous_runs_overlap_and_so_end_sooner():
    synchronous, overlapped = (simulate(World(max_staleness=eta)).summary for eta in (0, 1))
    assert overlapped["staleness/mean"] > 0.3
    assert overlapped["wall_s"] < 0.75 * synchronous["wall_s"]


def test_an_engine_that_crashes_costs_its_rollouts_and_nothing_else():
    world = World(steps=12, tokens_per_s=3.0, crashes={1: 5.0})
    report = simulate(world)
    check_laws(report, world)
    lost = report.loops.ledger.dropped
    assert 0 < lost[DropCause.ENGINE_LOST] <= world.slots
    assert set(lost) <= {DropCause.ENGINE_LOST, DropCause.TOO_STALE}  # what is asked again late may meet a newer policy
    assert report.loops.roster.names == ("rollout-0",)
    # what was lost was asked again: no draw is missing among the first ones
    trained = {group.prompt.draw.index for _, groups in report.trained for group in groups}
    assert trained == set(range(world.steps * world.prompts_per_batch))
    assert any("rollout-1 is out of service" in event for event in report.sink.events)


def test_a_run_that_loses_its_last_engine_ends_and_says_so():
    with pytest.raises(FleetLost, match="rollout-0"):
        simulate(World(crashes={0: 4.0, 1: 3.0}))


def test_a_swap_in_mid_rollout_leaves_mixed_versions_of_which_the_oldest_counts():
    world = World(max_staleness=2, tokens_per_s=3.0, step_s=0.5)
    report = simulate(world)
    check_laws(report, world)
    spans = [
        len(set(rollout.versions_T[rollout.loss_mask_T].tolist()))
        for _, groups in report.trained
        for group in groups
        for rollout in group.rollouts
    ]
    assert max(spans) > 1


@pytest.mark.parametrize("age_policy", ["drop", "mask"])
def test_slow_rollouts_that_grow_too_old_are_dropped_and_asked_again(age_policy):
    # one engine takes many steps for an answer, so what it sampled is too old when it comes in
    world = World(max_staleness=1, age_policy=age_policy, steps=8, tokens_per_s=1.0, step_s=0.2, slots=64)

    def slow_down(loops, fleet):
        fleet.engines["rollout-1"]._tokens_per_s = 0.15

    report = simulate(world, slow_down)
    ledger = report.loops.ledger
    assert ledger.submitted == ledger.trained + ledger.dropped.total() and ledger.lead == 0
    if age_policy == "drop":
        check_laws(report, world)
    assert len(report.trained) == world.steps


def test_a_rollout_that_vanishes_breaks_law_one_and_stops_the_run():
    def lose_one(loops, fleet):
        play = fleet.play

        async def forgetful(engine, prompt, spec):
            group = await play(engine, prompt, spec)
            return replace(group, rollouts=group.rollouts[1:]) if prompt.draw.source == "sim" else group

        fleet.play = forgetful

    with pytest.raises(LawBroken):
        simulate(World(), lose_one)


def test_the_same_world_gives_the_same_run():
    first, second = simulate(World(crashes={1: 3.0})), simulate(World(crashes={1: 3.0}))
    assert first.sink.steps == second.sink.steps
    assert first.virtual_s == second.virtual_s
