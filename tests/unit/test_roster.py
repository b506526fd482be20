import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.controller.roster import EngineSeconds, Place, Roster
from rlsys.rollout.router import EngineReport
from rlsys.sim.clock import VirtualClock


def new_roster(clock: VirtualClock, *, slots: int = 4, **steps: int) -> Roster:
    roster = Roster(list(steps), slots=slots, clock=clock)
    for name, step in steps.items():
        roster.serve(name, step)
    return roster


async def ask(roster: Roster, place: Place, number: int = 1) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(roster.acquire(place)) for _ in range(number)]
    await asyncio.sleep(0)
    return tasks


def done(tasks: list[asyncio.Task[str]]) -> int:
    return sum(task.done() for task in tasks)


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_every_released_slot_is_handed_out_at_once_to_the_oldest_group():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        older, younger = roster.line_up(), roster.line_up()
        after = await ask(roster, younger, 2)  # who stands further back may have come before
        first = await ask(roster, older, 5)
        assert (done(first), done(after)) == (2, 2)
        for count in ((3, 2), (4, 2), (5, 2)):
            roster.release("a")
            await settle()
            assert (done(first), done(after)) == count
        assert roster.num_running == 4

    clock.run(scenario())


def test_no_member_of_a_younger_group_starts_before_one_of_an_older_group():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        older, younger = roster.line_up(), roster.line_up()
        first, after = await ask(roster, older, 5), await ask(roster, younger, 3)
        assert (done(first), done(after)) == (4, 0)
        again = await ask(roster, older)  # a member of the older group that comes late, or a second time
        roster.release("a")
        roster.release("a")
        await settle()
        assert (done(first), done(again), done(after)) == (5, 1, 0)
        roster.release("a")
        await settle()
        assert done(after) == 1

    clock.run(scenario())


def test_a_place_is_held_until_a_version_new_enough_arrives_and_others_pass_meanwhile():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=1, b=1)
        (newer,) = await ask(roster, roster.line_up(min_step=2))
        (any_version,) = await ask(roster, roster.line_up())
        assert any_version.done() and not newer.done()
        roster.serve("b", 2)
        assert await newer == "b"

    clock.run(scenario())


def test_who_waits_for_a_slot_lets_others_pass_to_engines_that_are_too_old_for_him_and_to_no_other():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=5, b=3)
        await ask(roster, roster.line_up(min_step=5), 4)
        (newer,) = await ask(roster, roster.line_up(min_step=5))
        any_version = await ask(roster, roster.line_up(), 5)
        assert not newer.done() and [task.result() for task in any_version if task.done()] == ["b"] * 4
        roster.release("a")
        assert await newer == "a"

    clock.run(scenario())


def test_a_request_given_up_gives_its_slot_back():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        await ask(roster, roster.line_up(), 4)
        (waiting,) = await ask(roster, roster.line_up())
        roster.release("a")  # hands the slot to the one who waits, in the moment in which he gives up
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert roster.num_running == 3
        (parked, _) = await ask(roster, roster.line_up(), 2)
        assert parked.done() and roster.num_running == 4

    clock.run(scenario())


def test_with_the_last_engine_gone_everybody_waits_for_one_that_comes_and_proves_what_it_serves():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=3)
        await ask(roster, roster.line_up(min_step=3), 4)
        waiting = await ask(roster, roster.line_up(min_step=3), 2)
        roster.remove("a")
        everywhere = asyncio.create_task(roster.wait_all_serve(3))
        roster.add("b")
        await settle()
        assert not done(waiting) and not everywhere.done() and roster.num_in_service == 0
        roster.serve("b", 2)  # proven, and too old for both
        await settle()
        assert not done(waiting) and not everywhere.done() and roster.num_in_service == 1
        roster.serve("b", 3)
        await everywhere
        assert [await one for one in waiting] == ["b", "b"]

    clock.run(scenario())


def test_a_newcomer_takes_no_rollout_and_holds_up_no_publication_before_its_first_proof():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=1)
        roster.add("b")
        waiting = await ask(roster, roster.line_up(), 6)
        assert (done(waiting), roster.num_running) == (4, 4)
        await roster.wait_all_serve(1)
        assert roster.is_newcomer("b") and not roster.is_newcomer("a")
        roster.serve("b", 1)
        await settle()
        assert (done(waiting), roster.is_newcomer("b")) == (6, False)
        everywhere = asyncio.create_task(roster.wait_all_serve(2))
        roster.serve("a", 2)
        await settle()
        assert not everywhere.done(), "an engine in service was not waited for"
        roster.serve("b", 2)
        await everywhere
        with pytest.raises(ValueError, match="b is here already"):
            roster.add("b")

    clock.run(scenario())


def test_seconds_in_service_and_busy_ones_stay_when_their_engine_goes():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        await clock.sleep(2.0)
        assert await roster.acquire(roster.line_up()) == "a"
        await clock.sleep(3.0)
        roster.remove("a")  # busy for 3 of 5 seconds; its rollout went with it
        roster.release("a")
        roster.add("b")
        await clock.sleep(10.0)  # b has proven nothing: nobody is in service
        roster.serve("b", 0)
        await clock.sleep(4.0)
        assert roster.seconds() == EngineSeconds(in_service=9.0, busy=3.0)

    clock.run(scenario())


def test_busy_seconds_count_the_time_with_something_to_do():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0, b=0)
        place = roster.line_up()
        first = await roster.acquire(place)
        await clock.sleep(1.0)
        roster.release(first)
        second = await roster.acquire(place)  # on the same engine: both are idle, and ties go by name
        await clock.sleep(1.0)
        roster.release(second)
        await clock.sleep(5.0)
        assert (first, second) == ("a", "a")
        assert roster.seconds() == EngineSeconds(in_service=2 * 7.0, busy=2.0)

    clock.run(scenario())


def test_a_group_stays_on_its_engine_where_its_prompt_is_found_in_the_cache():
    clock = VirtualClock()

    async def scenario():
        for prompt_tokens, played_on in ((200, ["a", "a", "a", "a", "b"]), (100, ["a", "b", "a", "b", "a"])):
            roster = new_roster(clock, a=0, b=0)
            for name in roster.names:
                roster.observe(name, EngineReport(cache_block_tokens=128))
            place = roster.line_up(prompt_tokens=prompt_tokens)
            assert [await roster.acquire(place) for _ in range(5)] == played_on

    clock.run(scenario())


def filled(kv_share: float, preempted: int) -> EngineReport:
    return EngineReport(cache_block_tokens=16, num_waiting=0, kv_share=kv_share, num_preempted=preempted)


def test_slots_shrink_while_the_cache_overflows_and_what_runs_is_left_alone():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        waiting = await ask(roster, roster.line_up(), 6)
        roster.observe("a", filled(0.9, preempted=0))
        roster.observe("a", filled(0.9, preempted=2))
        assert (roster.num_slots, roster.num_running) == (3, 4)
        roster.release("a")
        await settle()
        assert done(waiting) == 4, "a slot that is gone was handed out"
        roster.release("a")
        await settle()
        assert done(waiting) == 5
        roster.observe("a", filled(0.5, preempted=2))
        await settle()
        assert (roster.num_slots, done(waiting)) == (4, 6)

    clock.run(scenario())


def test_what_a_weight_swap_throws_out_of_the_cache_costs_no_slot():
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, a=0)
        await ask(roster, roster.line_up(), 4)
        roster.observe("a", filled(0.9, preempted=0))
        roster.serve("a", 1)
        roster.observe("a", filled(0.9, preempted=4))  # vLLM counts what a swap throws out like any other
        assert roster.num_slots == 4
        roster.observe("a", filled(0.9, preempted=5))
        assert roster.num_slots == 3

    clock.run(scenario())


def says(is_overfull: bool) -> EngineReport:
    return EngineReport(cache_block_tokens=16, num_waiting=int(is_overfull), kv_share=1.0, num_preempted=0)


acts = st.lists(
    st.one_of(
        st.tuples(st.just("line up"), st.integers(0, 3), st.integers(1, 4)),
        st.tuples(st.just("release"), st.integers(0, 99), st.just(0)),
        st.tuples(st.just("serve"), st.integers(0, 1), st.integers(0, 3)),
        st.tuples(st.just("late"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("give up"), st.integers(0, 99), st.just(0)),
        st.tuples(st.just("report"), st.integers(0, 1), st.booleans()),
        st.tuples(st.just("come"), st.just(0), st.just(0)),
        st.tuples(st.just("go"), st.integers(0, 99), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(acts, st.integers(1, 4))
def test_whatever_happens_slots_are_kept_order_is_kept_and_no_slot_lies_idle_that_somebody_may_use(told, slots):
    clock = VirtualClock()

    async def scenario():
        roster = new_roster(clock, slots=slots, a=0, b=0)
        steps, held, waiting, places = {"a": 0, "b": 0}, [], [], []  # steps: -1 where nothing is proven
        num_named = 2

        async def settled() -> None:
            await settle()
            for place, task in [pair for pair in waiting if pair[1].done()]:
                waiting.remove((place, task))
                if not task.cancelled():
                    held.append(task.result())
                    assert steps[task.result()] >= place.min_step
                    younger_started.append((place.number, task.result()))
            assert set(roster.names) == set(steps)
            for name in steps:
                assert held.count(name) <= slots
            assert roster.num_running == sum(name in steps for name in held)
            for place, _ in waiting:
                for number, name in younger_started:
                    assert number <= place.number or steps[name] < place.min_step, "an older group was overtaken"
            for name in steps:
                free = roster._load(name).free_slots
                assert not free or not any(steps[name] >= place.min_step for place, _ in waiting), "a slot lies idle"

        for what, one, other in told:
            names = sorted(steps)
            younger_started: list[tuple[int, str]] = []
            if what == "line up":
                places.append(roster.line_up(min_step=one))
                waiting += [(places[-1], asyncio.create_task(roster.acquire(places[-1]))) for _ in range(other)]
            elif what == "late" and places:
                place = places[one % len(places)]
                waiting.append((place, asyncio.create_task(roster.acquire(place))))
            elif what == "release" and held:
                roster.release(held.pop(one % len(held)))
            elif what == "serve" and names:
                name = names[one % len(names)]
                steps[name] = max(steps[name], other)
                roster.serve(name, steps[name])
            elif what == "give up" and waiting:
                waiting[one % len(waiting)][1].cancel()
            elif what == "report" and names:
                roster.observe(names[one % len(names)], says(other))
            elif what == "come":
                name, num_named = f"e{num_named}", num_named + 1
                steps[name] = -1
                roster.add(name)
            elif what == "go" and names:
                del steps[names[one % len(names)]]
                roster.remove(names[one % len(names)])
            await settled()

    clock.run(scenario())
