"""Checkpoints of simulated runs: the learner waits for one copy, and whatever happens while that is written is lost or
repeated nowhere."""

import asyncio

import pytest

from rlsys.errors import CheckpointFailed, Diverged, WaitTimeout
from rlsys.records import Version
from rlsys.sim.fleet import SimDisk
from rlsys.sim.world import World, simulate

# a checkpoint takes 0.1 s to copy and as long as three steps to write
SLOW_DISK = World(steps=8, num_questions=50, step_s=1.0, save_s=0.1, write_s=4.0, checkpoint_every_steps=4,
                  eval_every_steps=0)  # fmt: skip


def diverging_at(step: int):
    """The learner's ``step`` is its last."""

    def disturb(loops, fleet):
        train = loops.parts.learner.step

        async def diverge(batch):
            if batch[0] == step:
                raise Diverged("the loss", step + 1, "none")
            return await train(batch)

        loops.parts.learner.step = diverge

    return disturb


def test_the_training_waits_for_the_copy_and_not_for_the_disk():
    report = simulate(SLOW_DISK)
    (told,) = [metrics for metrics in report.sink.steps if "timing_s/save_checkpoint" in metrics]
    assert told["step"] == 5 and told["timing_s/save_checkpoint"] == pytest.approx(0.1)
    (written,) = [metrics for metrics in report.sink.steps if "timing_s/write_checkpoint" in metrics]
    assert written["step"] > 6 and written["timing_s/write_checkpoint"] == pytest.approx(4.0)


def test_the_state_that_is_kept_is_that_of_the_copy():
    disk = SimDisk()
    simulate(SLOW_DISK, disk=disk)
    assert [state.version.step for state in disk.states] == [4, 8]
    assert disk.states[0].trained == 4 * SLOW_DISK.prompts_per_batch * SLOW_DISK.group_size
    assert disk.states[0].groups_trained == 4 * SLOW_DISK.prompts_per_batch


def test_a_run_that_ends_while_a_checkpoint_is_written_goes_on_from_the_one_before():
    disk = SimDisk()
    world = World(steps=12, num_questions=50, write_s=2.5, checkpoint_every_steps=4, eval_every_steps=0)
    with pytest.raises(Diverged):
        simulate(world, diverging_at(9), disk)  # the checkpoint of step 8 is under way
    assert [state.version.step for state in disk.states] == [4] and len(disk.commits) == 9
    report = simulate(world, disk=disk)
    assert [str(version) for version, _ in disk.commits] == [f"0.{n}" for n in (1, 2, 3, 4)] + [
        f"1.{n}" for n in range(5, 13)
    ]
    assert report.loops.ledger.trained == 12 * world.prompts_per_batch * world.group_size


def test_the_next_checkpoint_waits_for_the_one_under_way():
    disk = SimDisk()
    world = World(steps=4, num_questions=50, write_s=5.0, checkpoint_every_steps=1, eval_every_steps=0)
    report = simulate(world, disk=disk)
    assert [state.version.step for state in disk.states] == [1, 2, 3, 4]
    third = report.sink.steps[2]
    assert third["timing_s/save_checkpoint"] > 2.0, "it began while the first one was written"


def test_a_stop_waits_for_the_checkpoint_under_way_and_leaves_one_of_the_last_step():
    disk = SimDisk()

    def stop_while_it_is_written(loops, fleet):
        finish = loops.parts.checkpoints.finish

        async def and_stop(state):
            asyncio.get_running_loop().call_later(0.5, loops.stopping.set)
            await finish(state)

        loops.parts.checkpoints.finish = and_stop

    report = simulate(SLOW_DISK, stop_while_it_is_written, disk)
    last = report.loops.version
    assert Version(incarnation=0, step=4) < last < Version(incarnation=0, step=8)
    assert [state.version for state in disk.states] == [Version(incarnation=0, step=4), last]


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_last_checkpoint_that_cannot_be_written_fails_a_stop_and_is_only_told_at_the_end(is_stopped):
    def full_disk(loops, fleet):
        finish = loops.parts.checkpoints.finish

        async def refuse(state):
            await finish(state)
            raise CheckpointFailed("no space left on device")

        loops.parts.checkpoints.finish = refuse
        if is_stopped:
            asyncio.get_running_loop().call_later(2.0, loops.stopping.set)

    if is_stopped:
        with pytest.raises(CheckpointFailed, match="no space left"):
            simulate(SLOW_DISK, full_disk)
    else:
        report = simulate(SLOW_DISK, full_disk)
        assert "no checkpoint of step 8: no space left on device" in report.sink.events
        assert report.summary["steps"] == 8 and "eval_after" in report.summary


def test_a_disk_that_never_answers_is_named():
    def hang(loops, fleet):
        async def never(state):
            await asyncio.Event().wait()

        loops.parts.checkpoints.finish = never

    with pytest.raises(WaitTimeout, match="the checkpoint of step 4 to be written"):
        simulate(SLOW_DISK, hang)
