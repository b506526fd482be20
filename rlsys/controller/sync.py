"""Weight sync: the learner exports a version into a free segment; every engine pulls the newest one at its own pace.

The learner never waits for an engine (except where the caller asks to, at ``max_staleness`` 0). A publication that
finds no free segment is put off until one is: a segment that is being read is never overwritten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rlsys.controller.deadline import within
from rlsys.controller.parts import Fleet, Learner, Sink
from rlsys.controller.roster import Roster
from rlsys.errors import EngineLost, WaitTimeout, WeightsRefused
from rlsys.records import LoadReport, Version, WeightVersion
from rlsys.rollout.clock import Clock
from rlsys.weights.pool import SegmentPool

SEGMENT_POLL_S = 0.01  # between two looks for a free segment
MAX_REFUSALS = 3  # in a row: an engine that refuses so often is taken out of service


class WeightSync:
    """Publishes versions and drives the engines' pulls.

    Args:
        lose: takes an engine out of service, for a reason.
        export_timeout_s, load_timeout_s: deadlines of one export and one pull, seconds.
        start_timeout_s: that of an engine to come up, which is waited for where none is left.
        share: of the engines, at least one, that pull at a time, so that the fleet never stands still.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        fleet: Fleet,
        roster: Roster,
        segments: SegmentPool,
        clock: Clock,
        sink: Sink,
        lose: Callable[[str, str], Awaitable[None]],
        export_timeout_s: float,
        load_timeout_s: float,
        start_timeout_s: float,
        share: float = 1.0,
    ) -> None:
        self._learner, self._fleet, self._roster = learner, fleet, roster
        self._segments, self._clock, self._sink = segments, clock, sink
        self._lose, self._start_timeout_s = lose, start_timeout_s
        self._export_timeout_s, self._load_timeout_s = export_timeout_s, load_timeout_s
        self._share = share
        self._num_pulling = 0
        self._pull_ended = asyncio.Event()
        self._newest: WeightVersion | None = None
        self._pending: Version | None = None
        self._published = asyncio.Event()
        self._num_published = 0
        self._num_put_off = 0
        self._num_refused = 0
        self._loads: list[LoadReport] = []

    def counts(self) -> dict[str, float]:
        """Versions since the start."""
        return {
            "weights/published": self._num_published,
            "weights/put_off": self._num_put_off,
            "weights/refused": self._num_refused,
        }

    def drain_metrics(self) -> dict[str, float]:
        """Of the pulls since the last call; empty where there was none."""
        loads, self._loads = self._loads, []
        if not loads:
            return {}
        return {
            "weights/pause_s": sum(load.pause_s for load in loads) / len(loads),
            "weights/load_s": sum(load.total_s for load in loads) / len(loads),
            "weights/probe_difference": max(load.probe_difference for load in loads),
        }

    async def publish(self, version: Version) -> bool:
        """Export ``version`` and make it the one that engines pull. False where no segment is free: call
        ``publish_pending`` later."""
        segment = self._segments.acquire()
        if segment is None:
            self._num_put_off += self._pending is None
            self._pending = version
            return False
        weights = await within(
            self._export_timeout_s, f"the learner to export version {version}", self._learner.export(segment, version)
        )
        self._segments.publish(segment)
        self._newest, self._pending = weights, None
        self._num_published += 1
        self._published.set()
        return True

    async def publish_pending(self) -> None:
        if self._pending is not None:
            await self.publish(self._pending)

    async def publish_everywhere(self, version: Version) -> None:
        """Publish and wait until every engine in service serves it: at staleness 0, and before an evaluation that must
        see it."""

        async def publish_and_wait() -> None:
            while self._newest is None or self._newest.version < version:
                if not await self.publish(version):
                    await self._clock.sleep(SEGMENT_POLL_S)
            await self._roster.wait_all_serve(version.step)

        # one pull may be in progress when this one starts, so one more must fit
        rounds = -(-len(self._roster.names) // self._most_pulling) + 1
        seconds = self._export_timeout_s + rounds * self._load_timeout_s + self._start_timeout_s
        await within(seconds, f"version {version} on every engine: {self._roster.describe()}", publish_and_wait())

    async def pull_loop(self, engine: str) -> None:
        """One per engine.

        consumes: the newest published version.
        waits for: a version newer than the one the engine serves; its turn among the engines.
        unblocked by: publish; another engine's pull that ends.
        produces: an engine that serves it, proven; groups that waited for it start.
        """
        refusals = 0
        while engine in self._roster.names:
            weights = self._newest
            served = self._roster.step_of(engine)
            if weights is None or (served is not None and served >= weights.version.step):
                self._published.clear()
                await self._published.wait()
                continue
            if self._num_pulling >= self._most_pulling:
                self._pull_ended.clear()
                await self._pull_ended.wait()
                continue  # there may be a newer version by now, which is taken at once
            try:
                await self._pull(engine, weights)
                refusals = 0
            except WeightsRefused as error:
                refusals += 1
                self._num_refused += 1
                self._sink.event(f"{engine} refused weights {weights.version}: {error}")
                if refusals >= MAX_REFUSALS:
                    await self._lose(engine, f"refused weights {refusals} times in a row")
            except (EngineLost, WaitTimeout) as error:
                await self._lose(engine, str(error))

    @property
    def _most_pulling(self) -> int:
        return max(1, int(self._share * len(self._roster.names)))

    async def _pull(self, engine: str, weights: WeightVersion) -> None:
        self._segments.add_reader(weights.segment)
        self._num_pulling += 1
        try:
            report = await within(
                self._load_timeout_s,
                f"{engine} to load version {weights.version}",
                self._fleet.load(engine, weights),
            )
        finally:
            self._segments.remove_reader(weights.segment)
            self._num_pulling -= 1
            self._pull_ended.set()
        self._loads.append(report)
        if self._roster.is_newcomer(engine):
            self._sink.event(f"{engine} has proven version {weights.version} and is in service")
        self._roster.serve(engine, weights.version.step)
