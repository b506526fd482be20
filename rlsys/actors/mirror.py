"""Weight versions on machines other than the learner's: brought there once, for every engine of the machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray

from rlsys.actors.remote import answer
from rlsys.errors import EngineLost
from rlsys.records import Version, WeightVersion
from rlsys.weights.pool import NUM_SEGMENTS, SegmentPool
from rlsys.weights.tcp import Source

SEGMENT_POLL_S = 0.01  # between two looks for a free segment


class MirrorActor:
    """Keeps copies of the learner's segments on its machine. A plain actor: one version at a time."""

    def __repr__(self) -> str:
        return "WeightMirror"

    def segments(self, run: str) -> list[str]:
        """Paths of the segments on this machine; they are this process's, and go with it."""
        from rlsys.weights.segment import own_segments

        return own_segments(run, "mirror", NUM_SEGMENTS)

    def mirror(self, weights: WeightVersion, source: Source, path: str) -> WeightVersion:
        from rlsys.weights.tcp import mirror

        return mirror(weights, source, path)


class NodeMirror:
    """One machine's copies, as the fleet sees them: the channel ``tcp``.

    Args:
        name: appears in errors.
        actor: on that machine.
        paths: of its segments.
        source: the learner's.

    Attributes:
        is_lost: whether the actor is of no more use.
    """

    def __init__(self, name: str, actor: Any, paths: Sequence[str], source: Source) -> None:
        self._name, self._actor, self._source = name, actor, source
        self._pool = SegmentPool(paths)
        self.is_lost = False
        self._bringing: tuple[Version, asyncio.Task[WeightVersion]] | None = None

    @asynccontextmanager
    async def holding(self, weights: WeightVersion) -> AsyncIterator[WeightVersion]:
        """The version in a segment of that machine, which is not overwritten while this lasts.

        Raises WeightsRefused or EngineLost.
        """
        while True:
            if self._bringing is None or self._bringing[0] != weights.version:
                self._bringing = (weights.version, asyncio.create_task(self._bring(weights)))
            version, bringing = self._bringing
            try:
                there = await asyncio.shield(bringing)  # others may wait for it too
            except Exception:
                if self._bringing is not None and self._bringing[0] == version:
                    self._bringing = None  # the next one tries again
                raise
            try:
                self._pool.add_reader(there.segment)
                break
            except ValueError:  # it was overwritten between the two: this version is old by now, bring it again
                self._bringing = None
        try:
            yield there
        finally:
            self._pool.remove_reader(there.segment)

    def close(self) -> None:
        ray.kill(self._actor)

    async def _bring(self, weights: WeightVersion) -> WeightVersion:
        while (path := self._pool.acquire()) is None:
            await asyncio.sleep(SEGMENT_POLL_S)
        try:
            mirrored = await answer(self._actor.mirror.remote(weights, self._source, path), self._name, EngineLost)
        except BaseException as error:
            self._pool.abandon(path)
            self.is_lost = self.is_lost or isinstance(error, EngineLost)
            raise
        self._pool.publish(path)
        return mirrored
