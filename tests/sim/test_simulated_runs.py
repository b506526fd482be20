"""The real loops on virtual time: laws 1, 2 and 8 over whole runs, with and without faults."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from rlsys.buffer.staleness import staleness_of
from rlsys.errors import Diverged, FleetLost, LawBroken, TooManyDrops, WaitTimeout
from rlsys.records import DropCause
from rlsys.rollout.play import Member
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


def test_an_engine_that_crashes_costs_time_and_no_rollout():
    world = World(steps=12, num_questions=48, tokens_per_s=3.0, crashes={1: 5.0})
    report = simulate(world)
    check_laws(report, world)
    assert 0 < report.summary["rollouts_retried"] <= world.slots
    # what is played late may meet a newer policy, and take the rest of its group along
    assert set(report.loops.ledger.dropped) <= {DropCause.TOO_STALE, DropCause.STOPPED, DropCause.GROUP_TOO_SMALL}
    assert report.loops.roster.names == ("rollout-0",)
    # every member was played again inside its group: no group is smaller, no draw is missing among the first ones
    trained = [group for _, groups in report.trained for group in groups]
    if not report.loops.ledger.dropped:
        assert {len(group.rollouts) for group in trained} == {world.group_size}
        assert {group.prompt.attempt for group in trained} == {0}
    assert {group.prompt.draw.index for group in trained} == set(range(world.steps * world.prompts_per_batch))
    assert any("rollout-1 is out of service" in event for event in report.sink.events)


def test_a_run_that_loses_its_last_engine_ends_and_says_so():
    with pytest.raises(FleetLost, match="the last one, rollout-[01]: .*crashed"):
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
        score = loops.parts.scorer.score

        async def forgetful(group):
            scored = await score(group)
            return replace(scored, rollouts=scored.rollouts[1:]) if group.prompt.draw.source == "sim" else scored

        loops.parts.scorer.score = forgetful

    with pytest.raises(LawBroken, match="arrived with 3 rollouts, the ledger has 4"):
        simulate(World(), lose_one)


def test_a_rollout_that_comes_back_in_place_of_another_breaks_law_one_and_stops_the_run():
    def mix_up(loops, fleet):
        play = fleet.play

        async def another(engine, prompt, member, spec):
            return await play(engine, prompt, Member(name="0") if prompt.draw.source == "sim" else member, spec)

        fleet.play = another

    with pytest.raises(LawBroken, match="#0/1 was to be played and sim:.*#0/0 came back"):
        simulate(World(), mix_up)


def test_the_same_world_gives_the_same_run():
    first, second = simulate(World(crashes={1: 3.0})), simulate(World(crashes={1: 3.0}))
    assert first.sink.steps == second.sink.steps
    assert first.virtual_s == second.virtual_s


def test_a_learner_that_diverges_ends_the_run_with_that_very_error():
    def diverge(loops, fleet):
        async def step(batch):
            raise Diverged("the loss", 1, "0.0")

        loops.parts.learner.step = step

    with pytest.raises(Diverged, match="the loss is not finite at step 1"):
        simulate(World(), diverge)


def test_a_learner_that_hangs_is_named():
    def hang(loops, fleet):
        async def step(batch):
            await asyncio.Event().wait()

        loops.parts.learner.step = step

    with pytest.raises(WaitTimeout, match="the learner to train step 0"):
        simulate(World(), hang)


def test_a_reward_that_is_never_given_stops_the_run():
    def give_nothing(loops, fleet):
        async def score(group):
            return group.drop({rollout.rollout_id: DropCause.REWARD_ERROR for rollout in group.rollouts}, "broken")

        loops.parts.scorer.score = score

    with pytest.raises(TooManyDrops, match="reward_error broken"):
        simulate(World(), give_nothing)


def test_a_segment_that_is_read_for_long_puts_publication_off_and_nothing_else():
    def read_slowly(loops, fleet):
        fleet.engines["rollout-1"]._pause_s = 4.0  # a swap takes as long as several training steps

    world = World(max_staleness=3, steps=10, step_s=0.5)
    report = simulate(world, read_slowly)
    check_laws(report, world)
    assert report.summary["weights/put_off"] > 0
    assert report.loops.roster.step_of("rollout-0") == world.steps


def test_a_training_step_longer_than_the_stall_limit_is_no_stall():
    report = simulate(World(max_staleness=0, steps=2, step_s=50.0, stall_s=20.0))
    assert len(report.trained) == 2


def test_rollouts_that_never_get_on_are_found_and_named():
    def hang(loops, fleet):
        score = loops.parts.scorer.score

        async def hang_in_training(group):
            return await (asyncio.Event().wait() if group.prompt.draw.source == "sim" else score(group))

        loops.parts.scorer.score = hang_in_training

    with pytest.raises(WaitTimeout, match="scoring 32"):
        simulate(World(stall_s=20.0, score_timeout_s=1e7), hang)


@pytest.mark.parametrize("rewards", [(0.0, 0.0), (0.0, 1.0)])
def test_a_batch_without_any_difference_in_reward_is_told_once(rewards):
    def reward_by_member(loops, fleet):
        async def score(group):
            pairs = enumerate(group.rollouts)
            return replace(group, rollouts=tuple(replace(rollout, reward=rewards[k % 2]) for k, rollout in pairs))

        loops.parts.scorer.score = score

    events = [event for event in simulate(World(), reward_by_member).sink.events if "nothing to learn" in event]
    told = ["step 0: the rewards of every group are equal (mean 0): nothing to learn"]
    assert events == (told if rewards == (0.0, 0.0) else [])
