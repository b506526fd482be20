"""Law 5: each draw counts once in the lineage of the surviving weights, however a run is stopped, killed, resumed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.selection import zero_variance
from rlsys.records import DropCause, Version
from rlsys.sim.fleet import SimDisk
from rlsys.sim.world import SimReport, World, simulate
from tests.sim.chance import score_by_chance

WORLD = World(steps=4, prompts_per_batch=2, group_size=2, num_questions=6, num_eval=2, slots=4, tokens_per_s=4.0)
STAGES = ("fleet.play", "fleet.load", "scorer.score", "buffer.put", "buffer.take", "buffer.commit", "buffer.groups",
          "learner.step", "learner.export", "checkpoints.begin", "checkpoints.finish")  # fmt: skip


class Killed(Exception):
    """The process is gone."""


def kill_at(number: int | None) -> tuple[Callable[..., None], list[str]]:
    """Kill the run at the beginning or the end of its ``number``-th call of any part; None never. The list holds the
    calls so far."""
    seen: list[str] = []

    def disturb(loops, fleet):
        for stage in STAGES:
            part_name, method_name = stage.split(".")
            part = getattr(loops.parts, part_name)
            setattr(part, method_name, watched(stage, getattr(part, method_name)))

    def watched(stage, method):
        async def call(*arguments):
            passes(f"before {stage}")
            result = await method(*arguments)
            passes(f"after {stage}")
            return result

        return call

    def passes(moment: str) -> None:
        seen.append(moment)
        if len(seen) - 1 == number:
            raise Killed(moment)

    return disturb, seen


def live(world: World, disk: SimDisk, number: int | None) -> SimReport | None:
    """One life of the run; None where it was killed."""
    disturb, _ = kill_at(number)

    def by_chance_until_killed(loops, fleet):
        if world.selection:
            score_by_chance(50)(loops, fleet)
        disturb(loops, fleet)

    try:
        return simulate(world, by_chance_until_killed, disk)
    except Killed:
        return None


def check_exactly_once(disk: SimDisk, report: SimReport, world: World) -> None:
    assert [version.step for version, _ in disk.commits] == list(range(1, world.steps + 1))
    incarnations = [version.incarnation for version, _ in disk.commits]
    assert incarnations == sorted(incarnations)
    counts = Counter(draw for _, draws in disk.commits for draw in draws)
    assert set(counts.values()) == {1}, "a draw was trained twice"
    # no draw is left out: the trained ones are the first of the source's order, less those given up or filtered
    assert len(counts) == world.steps * world.prompts_per_batch
    ledger = report.loops.ledger
    assert report.loops.parts.source.counts().drawn == len(counts) + ledger.given_up + ledger.filtered
    assert ledger.submitted == ledger.trained + ledger.dropped.total() and ledger.lead == 0
    assert ledger.trained == report.summary["rollouts"]
    if not ledger.dropped:
        assert ledger.trained == world.steps * world.prompts_per_batch * world.group_size


def num_moments(world: World) -> int:
    disturb, seen = kill_at(None)
    simulate(world, disturb)
    return len(seen)


def test_the_law_holds_for_a_kill_at_the_beginning_or_the_end_of_every_single_call():
    total = num_moments(WORLD)
    assert total > 130
    for number in range(total):
        disk = SimDisk()
        assert live(WORLD, disk, number) is None
        report = live(WORLD, disk, None)
        assert report is not None
        check_exactly_once(disk, report, WORLD)


@given(
    kills=st.lists(st.integers(0, 250), max_size=6),
    max_staleness=st.integers(0, 3),
    every=st.integers(0, 3),
    crashes=st.dictionaries(st.just(1), st.floats(0.5, 20.0), max_size=1),
    seed=st.integers(0, 5),
    selection=st.sampled_from([(), (("zero_variance", zero_variance),)]),
    greedy=st.booleans(),
    write_s=st.sampled_from([0.3, 3.0]),
)
@settings(max_examples=60)
def test_the_law_holds_for_kills_after_kills_in_any_world(
    kills, max_staleness, every, crashes, seed, selection, greedy, write_s
):
    world = World(
        steps=6, prompts_per_batch=3, group_size=2, num_questions=7, num_eval=2, slots=6, tokens_per_s=4.0, seed=seed,
        max_staleness=max_staleness, checkpoint_every_steps=every, crashes=crashes, selection=selection,
        greedy_baseline=greedy, write_s=write_s,
    )  # fmt: skip
    disk = SimDisk()
    report = None
    for number in (*kills, None):
        report = live(world, disk, number)
        if report is not None:
            break
    assert report is not None
    check_exactly_once(disk, report, world)


@pytest.mark.parametrize("moment_s", [4.0, 9.0, 13.0, 21.0, 24.0])
def test_a_stop_loses_no_step_and_the_resumed_run_goes_on_in_the_same_incarnation(moment_s):
    world = World(steps=20, num_questions=50, checkpoint_every_steps=0, eval_every_steps=0)
    disk = SimDisk()

    def stop_later(loops, fleet):
        asyncio.get_running_loop().call_later(moment_s, loops.stopping.set)

    stopped = simulate(world, stop_later, disk)
    assert 0 < stopped.loops.version.step < world.steps
    assert disk.states[-1].version == stopped.loops.version == Version(incarnation=0, step=len(disk.commits))
    assert "eval_after" not in stopped.summary
    report = simulate(world, disk=disk)
    check_exactly_once(disk, report, world)
    assert {version.incarnation for version, _ in disk.commits} == {0}
    assert report.summary["eval_before"] == stopped.summary["eval_before"], "it is not evaluated anew"
    assert report.summary["wall_s"] > stopped.summary["wall_s"]


def test_a_filtered_draw_is_not_asked_again_by_a_resumed_run():
    world = World(steps=8, checkpoint_every_steps=4, eval_every_steps=0, selection=(("zero_variance", zero_variance),))
    disk = SimDisk()
    whole = simulate(world, score_by_chance(30), disk)
    middle = next(state for state in disk.states if state.version.step == 4)
    assert 0 < middle.filtered < whole.loops.ledger.filtered
    resumed = SimDisk(states=[middle], commits=[commit for commit in disk.commits if commit[0].step <= 4])
    report = simulate(world, score_by_chance(30), resumed)
    check_exactly_once(resumed, report, world)
    assert report.loops.ledger.filtered > middle.filtered


def test_finished_rollouts_that_were_saved_are_not_sampled_again():
    world = World(steps=10, max_staleness=3, checkpoint_every_steps=5, eval_every_steps=0)
    disk = SimDisk()
    simulate(world, disk=disk)
    middle = next(state for state in disk.states if state.version.step == 5)
    assert middle.groups, "nothing was buffered: the test shows nothing"
    saved = {group.group_id: group for group in middle.groups}
    resumed = SimDisk(states=[middle], commits=[commit for commit in disk.commits if commit[0].step <= 5])
    report = simulate(world, disk=resumed)
    trained = {group.group_id: group for _, groups in report.trained for group in groups}
    for group_id, group in saved.items():
        assert trained[group_id] is group


def test_steps_that_were_lost_start_a_new_incarnation_and_are_trained_again():
    disk = SimDisk()
    disturb, seen = kill_at(None)
    simulate(WORLD, disturb)
    third_step_done = [index for index, moment in enumerate(seen) if moment == "after buffer.commit"][2] + 1
    assert live(WORLD, disk, third_step_done) is None
    assert [version.step for version, _ in disk.commits] == [1, 2, 3] and disk.states[-1].version.step == 2
    report = live(WORLD, disk, None)
    assert report is not None
    check_exactly_once(disk, report, WORLD)
    assert [str(version) for version, _ in disk.commits] == ["0.1", "0.2", "1.3", "1.4"]


def test_no_version_is_ever_made_twice_however_often_the_same_step_is_lost():
    disk = SimDisk()
    disturb, seen = kill_at(None)
    simulate(WORLD, disturb)
    third_step_done = [index for index, moment in enumerate(seen) if moment == "after buffer.commit"][2] + 1
    made = []
    assert live(WORLD, disk, third_step_done) is None
    for _ in range(3):
        made += [disk.commits[-1][0]]
        disturb, seen = kill_at(None)
        resumed = SimDisk(states=list(disk.states), commits=list(disk.commits))
        simulate(WORLD, disturb, resumed)
        first_commit = seen.index("after buffer.commit") + 1
        assert live(WORLD, disk, first_commit) is None
    assert [str(version) for version in made] == ["0.3", "1.3", "2.3"]


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on():
    from rlsys.errors import CheckpointFailed

    disk = SimDisk()

    def full_disk(loops, fleet):
        finish = loops.parts.checkpoints.finish

        async def refuse(state):
            await finish(state)
            if state.version.step == 2:
                disk.states.pop()
                raise CheckpointFailed("no space left on device")

        loops.parts.checkpoints.finish = refuse

    report = simulate(WORLD, full_disk, disk)
    check_exactly_once(disk, report, WORLD)
    assert [state.version.step for state in disk.states] == [4]
    assert "no checkpoint of step 2: no space left on device" in report.sink.events


def test_groups_dropped_for_age_are_counted_once_over_a_resume():
    world = World(max_staleness=1, steps=8, tokens_per_s=1.0, step_s=0.2, slots=64, num_questions=32)

    def slow_down(loops, fleet):
        fleet.engines["rollout-1"]._tokens_per_s = 0.15

    disk = SimDisk()
    disturb, seen = kill_at(None)

    def both(loops, fleet):
        slow_down(loops, fleet)
        disturb(loops, fleet)

    whole = simulate(world, both)
    assert whole.loops.ledger.dropped[DropCause.TOO_STALE] > 0
    for number in range(0, len(seen), max(1, len(seen) // 12)):
        disk = SimDisk()
        assert live(world, disk, number) is None
        check_exactly_once(disk, simulate(world, slow_down, disk), world)
