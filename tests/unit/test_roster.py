import asyncio

import pytest

from rlsys.controller.roster import Roster
from rlsys.errors import FleetLost
from rlsys.sim.clock import VirtualClock


def new_roster(clock: VirtualClock, **steps: int) -> Roster:
    roster = Roster(list(steps), slots=4, clock=clock)
    for name, step in steps.items():
        roster.serve(name, step)
    return roster


async def ask(roster: Roster, num_rollouts: int, min_step: int = 0) -> asyncio.Task[str]:
    task = asyncio.create_task(roster.acquire(num_rollouts, min_step))
    await asyncio.sleep(0)
    return task


def test_slots_are_handed_out_in_order_and_a_small_request_does_not_overtake_a_large_one():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        first, large, small = await ask(roster, 3), await ask(roster, 4), await ask(roster, 1)
        assert await first == "a" and not large.done() and not small.done()
        roster.release("a", 3)
        assert await large == "a" and not small.done()
        roster.release("a", 4)
        assert await small == "a"

    clock.run(scenario())


def test_a_slot_is_held_until_a_version_new_enough_arrives_and_others_pass_meanwhile():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=1, b=1)
        newer, any_version = await ask(roster, 2, min_step=2), await ask(roster, 2)
        assert any_version.done() and not newer.done()
        roster.serve("b", 2)
        assert await newer == "b"

    clock.run(scenario())


def test_a_request_given_up_gives_its_slots_back():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        await ask(roster, 4)
        waiting = asyncio.create_task(roster.acquire(4))
        await asyncio.sleep(0)
        roster.release("a", 4)  # hands the slots to the one who waits, in the moment in which he gives up
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert roster.num_running == 0

    clock.run(scenario())


def test_with_the_last_engine_gone_everybody_who_waits_is_told():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        await ask(roster, 4)
        waiting = await ask(roster, 1)
        roster.remove("a")
        with pytest.raises(FleetLost):
            await waiting
        with pytest.raises(FleetLost):
            await roster.acquire(1)
        with pytest.raises(FleetLost):
            await roster.wait_all_serve(1)

    clock.run(scenario())


def test_busy_seconds_count_the_time_with_something_to_do_averaged_over_engines():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0, b=0)
        name = await (await ask(roster, 4))
        await clock.sleep(2.0)
        roster.release(name, 4)
        await clock.sleep(5.0)
        assert roster.busy_seconds() == pytest.approx(1.0)

    clock.run(scenario())


def test_a_request_that_fits_no_engine_is_refused_at_once():
    clock = VirtualClock()

    async def scenario():
        with pytest.raises(ValueError, match="5 rollouts at once do not fit an engine of 4 slots"):
            await new_roster(clock, a=0).acquire(5)

    clock.run(scenario())
