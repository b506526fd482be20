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
from rlsys.rollout.play import Member, PartialRollout, Played, PlaySpec

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
        num_moved: rollouts that went on on another engine because theirs let them go.
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
        self._under_way: dict[str, tuple[int, asyncio.Task[Played]]] = {}
        self._stopped: set[str] = set()
        self._oldest_step = 0  # of the versions that may begin what is trained
        self.num_retried = self.num_moved = 0
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
        self._oldest_step = max(self._oldest_step, step)
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
        if isinstance(ended, Rollout):
            self._sampled(ended)
            self.tokens_ended += ended.num_sampled_tokens if ages else 0
            self._ended.set()
        move(rollout_id, Stage.GATHERED)
        return ended

    async def _play_member(
        self, prompt: Prompt, member: Member, spec: PlaySpec, place: Place, move: Move, ages: bool
    ) -> Rollout | DroppedRollout:
        """One rollout; where its engine is lost it is played again on another one, ``max_retries`` times at most. Where
        its engine lets it go another one goes on with it."""
        rollout_id = member.rollout_id(prompt.group_id)
        while True:
            engine = await self._roster.acquire(place)
            move(rollout_id, Stage.RUNNING)
            if ages and _is_older(member.begun, self._oldest_step):  # grew too old while it waited
                member = self._again(member)
            try:
                playing = self._play_on(engine, prompt, member, spec)
                ended = await self._or_stopped(playing, rollout_id, self._began(engine, member) if ages else None)
                if not isinstance(ended, PartialRollout):
                    return ended
                member = self._to_be_moved(member, ended)
            except (EngineLost, WaitTimeout) as error:
                await self._lose(engine, str(error))
                if member.retry >= self._max_retries:
                    return DroppedRollout(rollout_id=rollout_id, cause=DropCause.ENGINE_LOST, detail=str(error))
                member = self._again(member, member.begun)
            finally:
                self._roster.release(engine)
            move(rollout_id, Stage.PARKED)

    def _again(self, member: Member, begun: PartialRollout | None = None) -> Member:
        """The next try, from ``begun`` on."""
        self.num_retried += 1
        return replace(member, retry=member.retry + 1, begun=begun)

    def _to_be_moved(self, member: Member, partial: PartialRollout) -> Member:
        """Who goes on with what there is; or begins anew where it cannot go on."""
        if partial.turn is None:
            return self._again(member)
        self.num_moved += 1
        return replace(member, begun=partial)

    def _began(self, engine: str, member: Member) -> int | None:
        """Step of the oldest version that has a part in it."""
        steps = [self._roster.step_of(engine), member.begun.oldest_step if member.begun is not None else None]
        return min((step for step in steps if step is not None), default=None)

    async def _play_on(self, engine: str, prompt: Prompt, member: Member, spec: PlaySpec) -> Played:
        rollout_id = member.rollout_id(prompt.group_id)
        playing = self._fleet.play(engine, prompt, member, spec)
        ended = await within(self._timeout_s, f"{engine} to play {rollout_id}", playing)
        if ended.rollout_id != rollout_id:
            raise LawBroken(f"{rollout_id} was to be played and {ended.rollout_id} came back")
        return ended

    async def _or_stopped(self, playing: Coroutine[Any, Any, Played], rollout_id: str, began: int | None) -> Played:
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


def _is_older(begun: PartialRollout | None, step: int) -> bool:
    """Whether a version before ``step`` has a part in it."""
    oldest = begun.oldest_step if begun is not None else None
    return oldest is not None and oldest < step


def _num_chars(prompt: Prompt) -> int:
    if isinstance(prompt.content, str):
        return len(prompt.content)
    return sum(len(message["content"]) for message in prompt.content)
