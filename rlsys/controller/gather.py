"""A group from its question to its last answer: every member on a slot of its own, put together when all have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import Any

from rlsys.controller.deadline import within
from rlsys.controller.ledger import Stage
from rlsys.controller.parts import Fleet
from rlsys.controller.roster import Place, Roster
from rlsys.errors import EngineLost, LawBroken, WaitTimeout
from rlsys.records import DropCause, DroppedRollout, Prompt, Rollout, RolloutGroup
from rlsys.rollout.play import Member, PlaySpec

CHARS_PER_TOKEN = 4.0  # of a prompt, until the first one has been played

Move = Callable[[str, Stage], None]


class Gatherer:
    """Plays groups on the fleet.

    Args:
        lose: takes an engine out of service, for a reason.
        sampled: told of each rollout that an engine has ended.
        timeout_s: deadline of one rollout; an engine that misses it is lost.
        max_retries: how often one rollout is played again whose engine was lost.

    Attributes:
        num_retried: rollouts that were played again because their engine was lost.
        tokens_ended: sampled tokens of all rollouts for the training that have ended.
    """

    def __init__(
        self,
        fleet: Fleet,
        roster: Roster,
        *,
        lose: Callable[[str, str], Awaitable[None]],
        sampled: Callable[[Rollout], None],
        timeout_s: float,
        max_retries: int,
    ) -> None:
        self._fleet, self._roster = fleet, roster
        self._lose, self._sampled, self._timeout_s = lose, sampled, timeout_s
        self._max_retries = max_retries
        self._num_chars, self._num_tokens = CHARS_PER_TOKEN, 1.0  # of the prompts played so far
        self._under_way: dict[str, tuple[int, asyncio.Task[Rollout | DroppedRollout]]] = {}
        self._stopped: set[str] = set()
        self.num_retried = 0
        self.tokens_ended = 0
        self._ended = asyncio.Event()

    async def play(
        self,
        prompt: Prompt,
        spec: PlaySpec,
        *,
        min_step: int = 0,
        move: Move = lambda rollout_id, stage: None,
        room: AbstractAsyncContextManager[object] | None = None,
        ages: bool = False,
    ) -> RolloutGroup:
        """Play every member as soon as a slot is free, on an engine that serves ``min_step`` or later.

        Args:
            move: told of each member: PARKED, RUNNING, and GATHERED when it has ended, whichever way.
            room: entered by each member before it asks for a slot.
            ages: whether it is for the training: members may be stopped for their age, and their tokens count.
        """
        place = self._roster.line_up(min_step, _num_chars(prompt) * self._num_tokens / self._num_chars)
        tasks = [
            asyncio.create_task(self._play_in(room or nullcontext(), prompt, member, spec, place, move, ages))
            for member in spec.members
        ]
        try:
            members = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        rollouts = tuple(member for member in members if isinstance(member, Rollout))
        if rollouts:
            self._num_chars += _num_chars(prompt)
            self._num_tokens += rollouts[0].num_prompt_tokens
        dropped = tuple(member for member in members if isinstance(member, DroppedRollout))
        return RolloutGroup(prompt=prompt, rollouts=rollouts, dropped=dropped)

    async def has_ended(self, tokens: int, wait_s: float) -> bool:
        """Whether ``tokens_ended`` is ``tokens`` or more within ``wait_s`` seconds."""
        try:
            async with asyncio.timeout(wait_s):
                while self.tokens_ended < tokens:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def stop_older(self, step: int) -> None:
        """Stop what is under way for the training on an engine that served an older version than ``step`` when it
        began: it comes back as dropped, and its slot is free. (A swap may have come before its first token: then a
        rollout is stopped that was as old as allowed.)"""
        for rollout_id, (began, playing) in self._under_way.items():
            if began < step:
                self._stopped.add(rollout_id)
                playing.cancel()

    async def _play_in(
        self,
        room: AbstractAsyncContextManager[object],
        prompt: Prompt,
        member: Member,
        spec: PlaySpec,
        place: Place,
        move: Move,
        ages: bool,
    ) -> Rollout | DroppedRollout:
        rollout_id = member.rollout_id(prompt.group_id)
        move(rollout_id, Stage.PARKED)
        async with room:
            ended = await self._play_member(prompt, member, spec, place, move, ages)
        if ended.rollout_id != rollout_id:
            raise LawBroken(f"{rollout_id} was to be played and {ended.rollout_id} came back")
        if isinstance(ended, Rollout):
            self._sampled(ended)
            self.tokens_ended += ended.num_sampled_tokens if ages else 0
            self._ended.set()
        move(rollout_id, Stage.GATHERED)
        return ended

    async def _play_member(
        self, prompt: Prompt, member: Member, spec: PlaySpec, place: Place, move: Move, ages: bool
    ) -> Rollout | DroppedRollout:
        """One rollout; where its engine is lost it is played again on another one, ``max_retries`` times at most."""
        rollout_id = member.rollout_id(prompt.group_id)
        while True:
            engine = await self._roster.acquire(place)
            move(rollout_id, Stage.RUNNING)
            try:
                playing = self._play_on(engine, prompt, member, spec)
                return await self._or_stopped(playing, rollout_id, self._roster.step_of(engine) if ages else None)
            except (EngineLost, WaitTimeout) as error:
                await self._lose(engine, str(error))
                if member.retry == self._max_retries:
                    return DroppedRollout(rollout_id=rollout_id, cause=DropCause.ENGINE_LOST, detail=str(error))
            finally:
                self._roster.release(engine)
            self.num_retried += 1
            member = replace(member, retry=member.retry + 1)
            move(rollout_id, Stage.PARKED)

    async def _play_on(self, engine: str, prompt: Prompt, member: Member, spec: PlaySpec) -> Rollout | DroppedRollout:
        who = f"{engine} to play {member.rollout_id(prompt.group_id)}"
        return await within(self._timeout_s, who, self._fleet.play(engine, prompt, member, spec))

    async def _or_stopped(
        self, playing: Coroutine[Any, Any, Rollout | DroppedRollout], rollout_id: str, began: int | None
    ) -> Rollout | DroppedRollout:
        """Its end, or what is left of it once it was stopped. ``began``: step of the version that begins it; None where
        it cannot be stopped."""
        if began is None:
            return await playing
        task = asyncio.create_task(playing)
        self._under_way[rollout_id] = began, task
        try:
            return await task
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if rollout_id not in self._stopped or (this is not None and this.cancelling()):
                raise
            return DroppedRollout(rollout_id=rollout_id, cause=DropCause.STOPPED, detail=f"it began at step {began}")
        finally:
            del self._under_way[rollout_id]
            self._stopped.discard(rollout_id)


def _num_chars(prompt: Prompt) -> int:
    if isinstance(prompt.content, str):
        return len(prompt.content)
    return sum(len(message["content"]) for message in prompt.content)
