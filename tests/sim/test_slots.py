"""Whole runs whose engines differ in what they can hold: stragglers, small caches, evaluations beside the training."""

from __future__ import annotations

from collections import Counter

import pytest

from rlsys.errors import EngineLost, FleetLost
from rlsys.records import DropCause
from rlsys.sim.world import SimReport, World, simulate


def watch_slots(most: Counter[str], world: World):
    """At every start of a rollout no engine plays more than its slots."""

    def disturb(loops, fleet):
        running = Counter[str]()
        play = fleet.play

        async def counted(engine, prompt, member, spec):
            running[engine] += 1
            most[engine] = max(most[engine], running[engine])
            assert running[engine] <= world.slots
            try:
                return await play(engine, prompt, member, spec)
            finally:
                running[engine] -= 1

        fleet.play = counted

    return disturb


def straggle(loops, fleet):
    """The first member of every fourth question takes 20 times as long as the others."""
    clock = loops.parts.clock

    def slow(generate):
        async def generate_slowly(request):
            draw, _, member = request.request_id.partition("#")
            turn = await generate(request)
            if draw.startswith("sim:") and int(draw.split(":")[2]) % 4 == 0 and member.split("/")[1] == "0:0":
                await clock.sleep(19.0)
            return turn

        return generate_slowly

    for engine in fleet.engines.values():
        engine._answer = lambda request, version: [65, 0]
        engine._tokens_per_s = 2.0  # an answer a second
        engine.generate = slow(engine.generate)


def test_stragglers_cost_their_own_slots_and_not_those_of_their_groups():
    world = World(
        steps=40, replicas=1, group_size=4, slots=4, max_staleness=8, step_s=0.01, num_questions=300,
        eval_every_steps=0, age_policy="mask",
    )  # fmt: skip
    report = simulate(world, straggle)
    # 16 rollouts take 15 x 1 s + 20 s of a slot, and there are 4 slots
    ceiling = 16 * 4 / 35
    # were slots given to whole groups, the 4 groups would have the engine for 1 + 1 + 1 + 20 s
    by_groups = 16 / 23
    assert by_groups < 0.4 * ceiling
    assert report.summary["rollouts_per_s"] > 0.85 * ceiling


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_groups_larger_than_an_engine_are_played_by_and_by(max_staleness):
    world = World(steps=4, group_size=6, slots=2, max_staleness=max_staleness)
    most = Counter[str]()
    report = simulate(world, watch_slots(most, world))
    assert {len(group.rollouts) for _, groups in report.trained for group in groups} == {6}
    assert set(most.values()) == {2}


def test_usable_slots_come_down_to_what_the_cache_holds_and_no_further():
    seen = []

    def look(loops, fleet):
        observe = loops.roster.observe

        def observed(name, report):
            observe(name, report)
            seen.append((report.num_waiting, loops.roster.num_slots))

        loops.roster.observe = observed

    world = World(
        steps=20, replicas=1, slots=32, cached_rollouts=8, prompts_per_batch=8, group_size=4, max_staleness=4,
        num_questions=200, tokens_per_s=4.0, step_s=0.2, eval_every_steps=0,
    )  # fmt: skip
    simulate(world, look)
    assert max(waiting for waiting, _ in seen) > 16
    settled = [slots for _, slots in seen[len(seen) // 2 :]]
    assert min(settled) >= 6 and max(settled) <= 11  # 8, one at a time upwards, a quarter downwards
    waiting = [waiting for waiting, _ in seen[len(seen) // 2 :]]
    assert max(waiting) <= 3


def test_an_evaluation_beside_the_training_goes_through_the_same_slots():
    world = World(steps=6, slots=3, num_eval=20, eval_every_steps=1, max_staleness=2)
    most = Counter[str]()
    report = simulate(world, watch_slots(most, world))
    assert any(name.startswith("val-core/") for metrics in report.sink.steps for name in metrics)
    assert set(most.values()) == {3}


def test_a_rollout_that_loses_every_engine_it_meets_leaves_its_group_smaller():
    def crash_on_one_rollout(loops, fleet):
        play = fleet.play

        async def crashing(engine, prompt, member, spec):
            if member.rollout_id(prompt.group_id) == "sim:0:3#0/1":
                raise EngineLost("it crashed")
            return await play(engine, prompt, member, spec)

        fleet.play = crashing

    world = World(replicas=3 + 2, steps=6)  # one more than its retries need
    report = simulate(world, crash_on_one_rollout)
    assert report.loops.ledger.dropped == {DropCause.ENGINE_LOST: 1}
    assert len(report.loops.roster.names) == 1
    sizes = {group.group_id: len(group.rollouts) for _, groups in report.trained for group in groups}
    assert sizes.pop("sim:0:3#0") == world.group_size - 1
    assert set(sizes.values()) == {world.group_size}


def cannot_say(loops, fleet):
    report = fleet.report

    async def gone(engine):
        if engine == "rollout-1":
            raise EngineLost("it does not say how loaded it is")
        return await report(engine)

    fleet.report = gone


def test_an_engine_that_cannot_be_asked_how_loaded_it_is_is_taken_out_of_service():
    report: SimReport = simulate(World(), cannot_say)
    assert report.loops.roster.names == ("rollout-0",)
    assert any("rollout-1 is out of service: it does not say" in event for event in report.sink.events)


def test_a_run_whose_only_engine_cannot_be_asked_ends_and_says_so():
    def silent(loops, fleet):
        async def gone(engine):
            raise EngineLost("it does not say how loaded it is")

        fleet.report = gone

    with pytest.raises(FleetLost, match="the last one, rollout-0: it does not say"):
        simulate(World(replicas=1), silent)
