"""A group from its question to its last answer: every member on a slot of its own, put together when all have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace

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
        self.num_retried = 0

    async def play(
        self,
        prompt: Prompt,
        spec: PlaySpec,
        *,
        min_step: int = 0,
        move: Move = lambda rollout_id, stage: None,
        room: AbstractAsyncContextManager[object] | None = None,
    ) -> RolloutGroup:
        """Play every member as soon as a slot is free, on an engine that serves ``min_step`` or later.

        Args:
            move: told of each member: PARKED, RUNNING, and GATHERED when it has ended, whichever way.
            room: entered by each member before it asks for a slot.
        """
        place = self._roster.line_up(min_step, _num_chars(prompt) * self._num_tokens / self._num_chars)
        tasks = [
            asyncio.create_task(self._play_in(room or nullcontext(), prompt, member, spec, place, move))
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

    async def _play_in(
        self,
        room: AbstractAsyncContextManager[object],
        prompt: Prompt,
        member: Member,
        spec: PlaySpec,
        place: Place,
        move: Move,
    ) -> Rollout | DroppedRollout:
        rollout_id = member.rollout_id(prompt.group_id)
        move(rollout_id, Stage.PARKED)
        async with room:
            ended = await self._play_member(prompt, member, spec, place, move)
        if ended.rollout_id != rollout_id:
            raise LawBroken(f"{rollout_id} was to be played and {ended.rollout_id} came back")
        if isinstance(ended, Rollout):
            self._sampled(ended)
        move(rollout_id, Stage.GATHERED)
        return ended

    async def _play_member(
        self, prompt: Prompt, member: Member, spec: PlaySpec, place: Place, move: Move
    ) -> Rollout | DroppedRollout:
        """One rollout; where its engine is lost it is played again on another one, ``max_retries`` times at most."""
        rollout_id = member.rollout_id(prompt.group_id)
        while True:
            engine = await self._roster.acquire(place)
            move(rollout_id, Stage.RUNNING)
            try:
                playing = self._fleet.play(engine, prompt, member, spec)
                return await within(self._timeout_s, f"{engine} to play {rollout_id}", playing)
            except (EngineLost, WaitTimeout) as error:
                await self._lose(engine, str(error))
                if member.retry == self._max_retries:
                    return DroppedRollout(rollout_id=rollout_id, cause=DropCause.ENGINE_LOST, detail=str(error))
            finally:
                self._roster.release(engine)
            self.num_retried += 1
            member = replace(member, retry=member.retry + 1)
            move(rollout_id, Stage.PARKED)


def _num_chars(prompt: Prompt) -> int:
    if isinstance(prompt.content, str):
        return len(prompt.content)
    return sum(len(message["content"]) for message in prompt.content)
