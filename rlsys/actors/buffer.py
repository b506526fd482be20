"""The replay buffer as a Ray actor: holds values, so that no rollout is lost with the worker that made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlsys.actors.remote import answer
from rlsys.buffer.replay import BufferCounts, ReplayBuffer, Take
from rlsys.errors import RlsysError
from rlsys.records import RolloutGroup, Version


class BufferActor(ReplayBuffer):
    """Async methods, so Ray runs it as an async actor: a waiting ``take`` does not hold up a ``put``."""

    def __repr__(self) -> str:
        return "ReplayBuffer"


class RayBuffer:
    """The controller's handle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def put(self, group: RolloutGroup) -> None:
        await answer(self._actor.put.remote(group), "the replay buffer", RlsysError)

    async def take(self, step: int, wait_s: float) -> Take:
        return await answer(self._actor.take.remote(step, wait_s), "the replay buffer", RlsysError)

    async def commit(self, lease_id: int, version: Version) -> None:
        await answer(self._actor.commit.remote(lease_id, version), "the replay buffer", RlsysError)

    async def groups(self) -> tuple[RolloutGroup, ...]:
        return await answer(self._actor.groups.remote(), "the replay buffer", RlsysError)

    async def restore(self, groups: Sequence[RolloutGroup], num_trained: int) -> None:
        await answer(self._actor.restore.remote(groups, num_trained), "the replay buffer", RlsysError)

    async def counts(self) -> BufferCounts:
        return await answer(self._actor.counts.remote(), "the replay buffer", RlsysError)
