"""Playing a group: every member on a slot of its own, retried where its engine is lost, put together at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from rlsys.controller.gather import Gatherer
from rlsys.controller.ledger import Stage
from rlsys.controller.roster import Roster
from rlsys.errors import EngineLost
from rlsys.records import DropCause, DroppedRollout, Prompt, Rollout, RolloutGroup, StopReason, Turn
from rlsys.rollout.play import Member, PartialRollout, PlaySpec
from rlsys.rollout.router import EngineReport
from rlsys.sim.clock import VirtualClock
from tests.builders import make_group, make_prompt

SPEC = PlaySpec(group_size=3, temperature=1.0, max_tokens=8, seed=0)
Play = Callable[[str, Member], float]


class TimedFleet:
    """Answers after as many seconds as ``seconds_of`` says."""

    def __init__(self, clock: VirtualClock, seconds_of: Play) -> None:
        self._clock, self._seconds_of = clock, seconds_of
        self.played: list[tuple[float, str, Member]] = []

    async def play(self, engine: str, prompt: Prompt, member: Member, spec: PlaySpec) -> Rollout | DroppedRollout:
        self.played.append((self._clock.now(), engine, member))
        await self._clock.sleep(self._seconds_of(engine, member))
        rollout = make_group(prompt.draw.index, [[0]]).rollouts[0]
        return replace(rollout, rollout_id=member.rollout_id(prompt.group_id), engine=engine, num_prompt_tokens=100)

    async def report(self, engine: str) -> EngineReport:
        raise AssertionError("not asked")


MAX_RETRIES = 3


class Scene:
    def __init__(self, seconds_of: Play, *, engines: int = 2, slots: int = 2, timeout_s: float = 50.0) -> None:
        self.clock = VirtualClock()
        self.lost: list[tuple[str, str]] = []
        self.sampled: list[Rollout] = []
        self.moves: list[tuple[float, str, Stage]] = []
        self.fleet = TimedFleet(self.clock, seconds_of)
        self._names, self._slots, self._timeout_s = [f"e{index}" for index in range(engines)], slots, timeout_s

    def run(self, main):
        async def begin():
            self.roster = Roster(self._names, slots=self._slots, clock=self.clock)
            for name in self._names:
                self.roster.serve(name, 0)
            self.gatherer = Gatherer(
                self.fleet,
                self.roster,
                lose=self.lose,
                sampled=self.sampled.append,
                timeout_s=self._timeout_s,
                max_retries=MAX_RETRIES,
            )
            return await main(self)

        return self.clock.run(begin())

    async def lose(self, engine: str, reason: str) -> None:
        self.lost.append((engine, reason))
        self.roster.remove(engine)

    def move(self, rollout_id: str, stage: Stage) -> None:
        self.moves.append((self.clock.now(), rollout_id.rpartition("/")[2], stage))

    async def play(self, **options) -> RolloutGroup:
        return await self.gatherer.play(make_prompt(), SPEC, move=self.move, **options)


def test_members_start_as_slots_get_free_and_the_group_is_put_together_in_their_order():
    scene = Scene(lambda engine, member: {"0": 5.0, "1": 1.0, "2": 1.0}[member.name], engines=1)
    group = scene.run(Scene.play)
    assert [rollout.rollout_id for rollout in group.rollouts] == ["test:0:0#0/0", "test:0:0#0/1", "test:0:0#0/2"]
    assert [(at, member.name) for at, _, member in scene.fleet.played] == [(0.0, "0"), (0.0, "1"), (1.0, "2")]
    assert scene.clock.now() == 5.0
    parked = [(0.0, name, Stage.PARKED) for name in "012"]
    assert scene.moves[:1] == parked[:1] and set(parked) <= set(scene.moves)
    assert [move for move in scene.moves if move[2] is not Stage.PARKED] == [
        (0.0, "0", Stage.RUNNING),
        (0.0, "1", Stage.RUNNING),
        (1.0, "1", Stage.GATHERED),
        (1.0, "2", Stage.RUNNING),
        (2.0, "2", Stage.GATHERED),
        (5.0, "0", Stage.GATHERED),
    ]


def test_a_straggler_holds_its_own_slot_and_no_other():
    async def two_groups(scene: Scene):
        second = replace(make_prompt(), attempt=1)
        groups = asyncio.gather(scene.play(), scene.gatherer.play(second, SPEC))
        await scene.clock.sleep(3.5)
        held = scene.roster.num_running
        await groups
        return held

    scene = Scene(lambda engine, member: 40.0 if member.name == "0" else 1.0, engines=1, slots=3)
    assert scene.run(two_groups) == 2  # the two stragglers; all others have come and gone
    assert [at for at, _, _ in scene.fleet.played] == [0.0, 0.0, 0.0, 1.0, 1.0, 2.0]


def lose_engines(*doomed: str) -> Play:
    def seconds_of(engine: str, member: Member) -> float:
        if engine in doomed:
            raise EngineLost(f"{engine} crashed")
        return 1.0

    return seconds_of


def test_members_lost_with_their_engine_are_played_again_on_another_one_under_the_same_name():
    scene = Scene(lose_engines("e0"))
    group = scene.run(Scene.play)
    assert [rollout.engine for rollout in group.rollouts] == ["e1"] * 3 and group.dropped == ()
    assert [rollout.rollout_id for rollout in group.rollouts] == [f"test:0:0#0/{member}" for member in range(3)]
    retries = [member.retry for _, engine, member in scene.fleet.played if engine == "e1"]
    lost = sum(engine == "e0" for _, engine, _ in scene.fleet.played)
    assert sum(retries) == lost == scene.gatherer.num_retried > 0
    assert scene.roster.num_running == 0


def test_a_rollout_whose_engines_are_lost_again_and_again_is_dropped_by_name():
    engines = [f"e{index}" for index in range(MAX_RETRIES + 2)]

    def seconds_of(engine: str, member: Member) -> float:
        if member.name == "0":
            raise EngineLost(f"{engine} crashed")
        return 1.0

    scene = Scene(seconds_of, engines=len(engines), slots=3)
    group = scene.run(Scene.play)
    assert [rollout.rollout_id for rollout in group.rollouts] == ["test:0:0#0/1", "test:0:0#0/2"]
    assert [(member.rollout_id, member.cause) for member in group.dropped] == [("test:0:0#0/0", DropCause.ENGINE_LOST)]
    assert "crashed" in group.dropped[0].detail
    assert len(scene.lost) == MAX_RETRIES + 1


def test_an_engine_that_misses_the_deadline_of_a_rollout_is_lost():
    scene = Scene(lambda engine, member: 60.0 if engine == "e0" else 1.0)
    group = scene.run(Scene.play)
    assert len(group.rollouts) == 3
    assert scene.lost[0][0] == "e0" and "e0 to play test:0:0#0/" in scene.lost[0][1]


def _partial(member: Member, steps: list[int]) -> PartialRollout:
    """With one token for each of the versions."""
    turn = Turn(
        token_ids_T=np.arange(len(steps), dtype=np.int32),
        behaviour_logprobs_T=np.full(len(steps), -1.0, dtype=np.float32),
        versions_T=np.array(steps, dtype=np.int64),
        stop_reason=StopReason.INTERRUPTED,
    )
    return PartialRollout(rollout_id=member.rollout_id(make_prompt().group_id), turn=turn, seconds=1.0)


def _let_go(scene: Scene, steps: list[int] | None) -> dict[str, PartialRollout]:
    """Engine e0 lets go what it is given, with a token for each of the versions; None: what cannot go on. Returns what
    it handed out, by the members' names."""
    play, handed_out = scene.fleet.play, dict[str, PartialRollout]()

    async def play_or_let_go(engine, prompt, member, spec):
        ended = await play(engine, prompt, member, spec)
        if engine != "e0":
            return ended
        scene.roster.remove("e0")
        partial = _partial(member, steps or [])
        handed_out[member.name] = replace(partial, turn=None) if steps is None else partial
        return handed_out[member.name]

    scene.fleet.play = play_or_let_go  # type: ignore[method-assign]
    return handed_out


def test_what_is_let_go_goes_on_on_another_engine_with_what_it_had():
    scene = Scene(lambda engine, member: 1.0)
    handed_out = _let_go(scene, [0, 0])
    group = scene.run(Scene.play)
    assert [rollout.engine for rollout in group.rollouts] == ["e1"] * 3 and group.dropped == ()
    begun = [member for _, engine, member in scene.fleet.played if engine == "e1" and member.begun is not None]
    assert all(member.begun is handed_out[member.name] and member.retry == 0 for member in begun)
    assert len(begun) == scene.gatherer.num_moved > 0 and scene.gatherer.num_retried == 0
    assert scene.lost == [] and scene.roster.num_running == 0
    stages = [stage for _, name, stage in scene.moves if name == begun[0].name]
    assert stages == [Stage.PARKED, Stage.RUNNING, Stage.PARKED, Stage.RUNNING, Stage.GATHERED]


def test_what_is_let_go_and_cannot_go_on_is_played_again():
    scene = Scene(lambda engine, member: 1.0)
    _let_go(scene, None)
    scene.run(Scene.play)
    again = [member for _, engine, member in scene.fleet.played if member.retry]
    assert len(again) == scene.gatherer.num_retried > 0 == scene.gatherer.num_moved
    assert all(member.begun is None for member in again)


def test_an_engine_lost_after_a_move_costs_only_what_it_added_itself():
    def seconds_of(engine: str, member: Member) -> float:
        if engine == "e1":
            raise EngineLost("e1 crashed")
        return 1.0

    async def until_one_comes(scene: Scene):
        playing = asyncio.create_task(scene.play())
        await scene.clock.sleep(7.0)
        scene.roster.add("e2")
        scene.roster.serve("e2", 0)
        return await playing

    scene = Scene(seconds_of, slots=3)
    handed_out = _let_go(scene, [0, 0])
    group = scene.run(until_one_comes)
    assert [rollout.engine for rollout in group.rollouts] == ["e2"] * 3
    begun = {member.name: member.begun for _, engine, member in scene.fleet.played if engine == "e2"}
    assert scene.gatherer.num_moved == len(handed_out) > 0
    assert all(begun[name] is partial for name, partial in handed_out.items())


@pytest.mark.parametrize("began", [3, 4])
def test_what_grew_too_old_while_it_was_moved_is_begun_anew(began):
    async def grow_old(scene: Scene):
        scene.roster.remove("e1")
        scene.roster.serve("e0", began)
        playing = asyncio.create_task(scene.play(ages=True))
        await scene.clock.sleep(2.0)  # it is let go after one second
        scene.gatherer.stop_older(4)
        scene.roster.add("e2")
        scene.roster.serve("e2", 5)
        await scene.clock.sleep(0.5)
        scene.gatherer.stop_older(5)  # what goes on is as old as it began
        return await playing

    scene = Scene(lambda engine, member: 1.0, slots=3)
    _let_go(scene, [began])
    group = scene.run(grow_old)
    again = [member for _, engine, member in scene.fleet.played if engine == "e2"]
    if began == 3:
        assert {(member.retry, member.begun) for member in again} == {(1, None)} and len(group.rollouts) == 3
    else:
        assert {member.retry for member in again} == {0} and scene.gatherer.num_retried == 0
        assert [member.cause for member in group.dropped] == [DropCause.STOPPED] * 3


def test_with_the_last_engine_gone_a_group_waits_for_one_that_comes():
    async def until_one_comes(scene: Scene):
        playing = asyncio.create_task(scene.play())
        await scene.clock.sleep(7.0)
        assert scene.roster.names == () and not playing.done()
        scene.roster.add("e2")
        scene.roster.serve("e2", 0)
        return await playing

    group = Scene(lose_engines("e0", "e1")).run(until_one_comes)
    assert [rollout.engine for rollout in group.rollouts] == ["e2"] * 3 and group.dropped == ()


def test_a_group_given_up_gives_all_its_slots_back():
    async def give_up(scene: Scene):
        playing = asyncio.create_task(scene.play())
        await scene.clock.sleep(0.5)
        assert scene.roster.num_running == 2
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        assert scene.roster.num_running == 0

    Scene(lambda engine, member: 1.0, engines=1).run(give_up)


def test_no_more_members_ask_for_slots_than_there_is_room_for():
    async def in_a_small_room(scene: Scene):
        await scene.play(room=asyncio.Semaphore(1))

    scene = Scene(lambda engine, member: 1.0)
    scene.run(in_a_small_room)
    assert [at for at, _, _ in scene.fleet.played] == [0.0, 1.0, 2.0]


def test_the_length_of_a_prompt_is_told_from_those_played_before():
    async def play_twice(scene: Scene):
        lined_up = []
        line_up = scene.roster.line_up

        def noted(min_step, prompt_tokens):
            lined_up.append(prompt_tokens)
            return line_up(min_step, prompt_tokens)

        scene.roster.line_up = noted
        prompt = replace(make_prompt(), content="x" * 396)
        for attempt in range(2):
            await scene.gatherer.play(replace(prompt, attempt=attempt), SPEC)
        return lined_up

    first, second = Scene(lambda engine, member: 1.0).run(play_twice)
    assert first == 99.0  # four characters a token, before anything is known
    assert second == pytest.approx(396 * 101 / 400)  # 100 tokens were counted in 396 characters
