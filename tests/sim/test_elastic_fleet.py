"""Engines that come and go while the run goes on: the real loops on virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.controller.attrition import AGED
from rlsys.controller.crew import ALONE_S, MAX_FAILURES, STEADY_S, places_for
from rlsys.errors import EngineLost, FleetLost, RlsysError
from rlsys.records import DropCause, Rollout
from rlsys.rollout.play import PartialRollout
from rlsys.sim.fleet import SimMachine
from rlsys.sim.world import MAX_TOKENS, SimReport, World, simulate
from tests.sim.test_simulated_runs import check_laws

# with one engine a run of some minutes of virtual time, which its slots limit
SLOW = World(steps=12, replicas=1, slots=4, num_questions=48, tokens_per_s=3.0, step_s=0.2, eval_every_steps=0)


def prove_before_playing(played: Counter[str]):
    """No engine plays a rollout before it has loaded a version, and then it serves the newest of that moment."""

    def disturb(loops, fleet):
        play, load = fleet.play, fleet.load
        proven: set[str] = set()

        async def checked(engine, prompt, member, spec):
            assert engine in proven, f"{engine} plays and has proven nothing"
            played[engine] += 1
            return await play(engine, prompt, member, spec)

        async def loaded(engine, weights):
            assert engine in proven or weights.version == loops.sync._newest.version, "it began with an old version"
            report = await load(engine, weights)
            proven.add(engine)
            return report

        fleet.play, fleet.load = checked, loaded

    return disturb


def test_a_machine_that_joins_gets_engines_that_prove_the_newest_version_and_then_play():
    world = replace(SLOW, machines={"late": SimMachine(room=2, joins_s=10.0)})
    played = Counter[str]()
    report = simulate(world, prove_before_playing(played))
    check_laws(report, world)
    assert report.loops.roster.names == ("rollout-0", "rollout-1", "rollout-2")
    assert min(played.values()) > 0 and set(played) == set(report.loops.roster.names)
    alone = simulate(SLOW)
    assert report.virtual_s < 0.7 * alone.virtual_s
    assert set(report.loops.ledger.dropped) <= AGED | {DropCause.GROUP_TOO_SMALL}
    assert any("rollout-2 has proven version" in event for event in report.sink.events)
    assert report.summary["rollout/engines_joined"] == 2 and report.summary["rollout/engines_lost"] == 0
    assert 1.0 < report.summary["balance/engines"] < 3.0


@pytest.mark.parametrize("is_drained", [False, True])
def test_a_machine_that_leaves_takes_its_engines_along_and_no_rollout(is_drained):
    world = replace(SLOW, machines={"guest": SimMachine(room=2, joins_s=2.0, leaves_s=20.0, is_drained=is_drained)})
    report = simulate(world, prove_before_playing(Counter()))
    check_laws(report, world)
    assert report.loops.roster.names == ("rollout-0",)
    assert report.summary["rollout/engines_lost"] == 2
    lost, moved = report.summary["rollouts_retried"], report.summary["rollouts_moved"]
    assert (lost == 0 < moved) if is_drained else (moved == 0 < lost)
    assert set(report.loops.ledger.dropped) <= AGED | {DropCause.GROUP_TOO_SMALL}
    draws = {group.prompt.draw.index for _, groups in report.trained for group in groups}
    assert len(draws) == world.steps * world.prompts_per_batch


def follow_moves(begun: dict[str, list[PartialRollout]]):
    """Whatever goes on goes on with all that its engine had handed out, once, and keeps it to its end."""

    def disturb(loops, fleet):
        play, open_parts = fleet.play, dict[str, PartialRollout]()

        async def followed(engine, prompt, member, spec):
            rollout_id = member.rollout_id(prompt.group_id)
            handed_out = open_parts.pop(rollout_id, None)
            if member.begun is None:  # the first time, or anew since it cannot go on or is too old by now
                assert handed_out is None or member.retry
            else:
                assert member.begun is handed_out
            try:
                ended = await play(engine, prompt, member, spec)
            except (EngineLost, asyncio.CancelledError):
                if handed_out is not None:
                    open_parts[rollout_id] = handed_out  # it is gone on with once more
                raise
            said = [] if member.begun is None else member.begun.turn.token_ids_T.tolist()
            versions = [] if member.begun is None else member.begun.turn.versions_T.tolist()
            if isinstance(ended, PartialRollout):
                assert ended.turn.token_ids_T[: len(said)].tolist() == said
                open_parts[rollout_id] = ended
                begun.setdefault(rollout_id, []).append(ended)
            elif isinstance(ended, Rollout):
                sampled = slice(ended.num_prompt_tokens, ended.num_prompt_tokens + len(said))
                assert ended.token_ids_T[sampled].tolist() == said
                assert ended.versions_T[sampled].tolist() == versions
                assert ended.num_sampled_tokens <= MAX_TOKENS
            return ended

        fleet.play = followed

    return disturb


def test_an_engine_that_hangs_when_it_has_to_go_is_given_up_and_what_it_played_is_played_again():
    def hang(loops, fleet):
        async def interrupt(engine):
            await asyncio.Event().wait()

        fleet.interrupt = interrupt

    world = replace(SLOW, machines={"guest": SimMachine(room=2, joins_s=2.0, leaves_s=20.0, is_drained=True)})
    report = simulate(world, hang)
    check_laws(report, world)
    assert any("rollout-1 to let go what it plays: no answer" in event for event in report.sink.events)


def test_a_lost_engine_is_replaced_and_the_others_play_on():
    world = replace(SLOW, replicas=2, wanted=2, machines={"home": SimMachine(room=2)}, crashes={0: 10.0})
    report = simulate(world, prove_before_playing(Counter()))
    check_laws(report, world)
    assert report.loops.roster.names == ("rollout-1", "rollout-2")


def test_the_only_engine_is_replaced_too_and_nobody_gives_up_meanwhile():
    world = replace(
        SLOW, wanted=1, start_s=50.0, stall_s=20.0, machines={"home": SimMachine(room=1)}, crashes={0: 10.0}
    )
    report = simulate(world)
    check_laws(report, world)
    assert report.loops.roster.names == ("rollout-1",)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_at_any_staleness_engines_come_and_go(max_staleness):
    machines = {
        "first": SimMachine(room=1, joins_s=3.0, leaves_s=14.0),
        "second": SimMachine(room=2, joins_s=9.0, leaves_s=30.0, is_drained=True),
    }
    world = replace(SLOW, max_staleness=max_staleness, machines=machines)
    report = simulate(world, prove_before_playing(Counter()))
    check_laws(report, world)


def test_no_more_engines_come_than_are_wanted():
    world = replace(SLOW, wanted=2, machines={"a": SimMachine(room=5), "b": SimMachine(room=3, joins_s=5.0)})
    report = simulate(world)
    assert report.loops.roster.names == ("rollout-0", "rollout-1")


def test_a_machine_on_which_engines_fail_again_and_again_is_given_up_by_name_and_others_are_not():
    world = replace(SLOW, machines={"bad": SimMachine(room=2, broken_starts=100), "good": SimMachine(room=1)})
    report = simulate(world)
    check_laws(report, world)
    starts = [event for event in report.sink.events if "starts on bad" in event]
    assert len(starts) == 2 * MAX_FAILURES  # two at a time, which fail together
    (given_up,) = [event for event in report.sink.events if "given up" in event]
    assert given_up.startswith(f"bad is given up: engines failed there {MAX_FAILURES} times in a row; the last one, ")
    assert "bad is broken" in given_up
    assert report.loops.roster.num_in_service == 2


def test_engines_that_come_up_and_die_soon_are_bounded_like_those_that_do_not_come_up():
    world = replace(SLOW, steps=40, num_questions=200, machines={"bad": SimMachine(room=1, lives_s=6.0)})
    report = simulate(world)
    assert sum("starts on bad" in event for event in report.sink.events) == MAX_FAILURES
    assert report.loops.roster.names == ("rollout-0",)


def test_an_engine_that_served_for_long_is_replaced_however_often():
    far = SimMachine(room=1, lives_s=STEADY_S + 10.0)
    world = replace(SLOW, steps=60, num_questions=300, tokens_per_s=0.3, slots=3, machines={"far": far})
    report = simulate(world)
    starts = sum("starts on far" in event for event in report.sink.events)
    assert starts > MAX_FAILURES + 1 and not any("given up" in event for event in report.sink.events)
    check_laws(report, world)


def test_with_no_engine_left_and_none_that_can_come_the_run_ends_and_says_which_was_the_last():
    world = replace(SLOW, machines={"bad": SimMachine(room=1, broken_starts=100)}, crashes={0: 30.0})
    with pytest.raises(FleetLost, match=f"for {ALONE_S:.0f} s there was no room .* rollout-0: .*crashed"):
        simulate(world)


def test_a_machine_that_joins_in_time_saves_a_run_without_engines():
    crashes, machines = {0: 5.0}, {"late": SimMachine(room=1, joins_s=5.0 + 0.8 * ALONE_S)}
    world = replace(SLOW, crashes=crashes, machines=machines)
    report = simulate(world)
    check_laws(report, world)
    assert report.loops.roster.names == ("rollout-1",)


def test_machines_that_cannot_be_asked_for_a_while_stop_nothing_and_are_told_of_once():
    def cut_off(loops, fleet):
        survey, clock = loops.parts.machines.survey, loops.parts.clock

        async def cut():
            if 4.0 < clock.now() < 15.0:
                raise RlsysError("nobody answers")
            return await survey()

        loops.parts.machines.survey = cut

    world = replace(SLOW, machines={"late": SimMachine(room=1, joins_s=10.0)})
    report: SimReport = simulate(world, cut_off)
    check_laws(report, world)
    assert [event for event in report.sink.events if "nobody answers" in event] == [
        "no engine is started or replaced for now: nobody answers"
    ]
    assert len(report.loops.roster.names) == 2


def test_engines_go_where_most_room_is_left():
    assert places_for({"a": 1, "b": 3, "c": 0}, 9) == ["b", "b", "a", "b"]
    assert places_for({"a": 2, "b": 2}, 3) == ["a", "b", "a"]
    assert places_for({"a": 2}, 0) == [] and places_for({"a": -1}, 4) == []


MOMENTS = st.floats(0.0, 60.0)
machines = st.builds(
    lambda room, joins_s, stays_s, is_drained, broken_starts, lives_s: SimMachine(
        room=room,
        joins_s=joins_s,
        leaves_s=joins_s + stays_s,
        is_drained=is_drained,
        broken_starts=broken_starts,
        lives_s=lives_s,
    ),
    st.integers(1, 3),
    MOMENTS,
    MOMENTS,
    st.booleans(),
    st.integers(0, 4),
    st.none() | st.floats(1.0, 40.0),
)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), machines, max_size=3),
    st.none() | st.integers(1, 3),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0.0, 2.0, 30.0]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_whenever_engines_come_and_go_every_rollout_is_trained_once_or_dropped_by_name(
    visitors, wanted, max_staleness, start_s, has_steady_engine, seed
):
    crashes = {0: 7.0, 1: 25.0} if not has_steady_engine else {1: 25.0}
    world = World(
        steps=8, replicas=2, machines=visitors, wanted=wanted, max_staleness=max_staleness, start_s=start_s,
        crashes=crashes, seed=seed, tokens_per_s=3.0, num_questions=80,
    )  # fmt: skip
    begun = dict[str, list[PartialRollout]]()

    def disturb(loops, fleet):
        prove_before_playing(Counter())(loops, fleet)
        follow_moves(begun)(loops, fleet)

    try:
        report = simulate(world, disturb)
    except FleetLost:
        assert not has_steady_engine
        return
    check_laws(report, world)
    assert report.summary["rollouts_moved"] == sum(map(len, begun.values()))
    seconds = report.loops.roster.seconds()
    assert 0.0 <= seconds.busy <= seconds.in_service
    assert 0.0 <= report.summary["idle/rollout"] <= 1.0
