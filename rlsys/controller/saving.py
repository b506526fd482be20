"""Stopping and going on: what of a run is kept in a checkpoint, beside the learner's weights, and how it comes back.

The learner stands still between two steps while the state is taken, and trains on while it is written. The loops
around it never stop: a group that is on its way into the buffer or out of it at the moment of the copy is saved as a
question that is asked again. Until the last byte is written, a killed run goes on from the checkpoint before.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from rlsys.controller.deadline import within
from rlsys.controller.ledger import Ledger
from rlsys.controller.parts import Parts
from rlsys.controller.roster import EngineSeconds
from rlsys.controller.state import RunState
from rlsys.controller.totals import Totals
from rlsys.errors import CheckpointFailed
from rlsys.records import Version


def gone_on_from(state: RunState, last: Version | None) -> RunState:
    """What a run goes on with whose newest checkpoint is ``state`` and whose last trained version was ``last``.

    Where steps were lost it is a new incarnation: they are trained again, into other weights under the same steps.
    """
    if last is None or last <= state.version:
        return state
    return replace(state, version=Version(incarnation=last.incarnation + 1, step=state.version.step))


class Saver:
    """Takes and restores the state of a run.

    Args:
        state: what the run goes on from.
        timeout_s: deadline of one checkpoint, and of the buffer's answers, seconds.
    """

    def __init__(self, parts: Parts, ledger: Ledger, totals: Totals, state: RunState, timeout_s: float) -> None:
        self._parts, self._ledger, self._totals = parts, ledger, totals
        self._saved, self._timeout_s = state, timeout_s
        self._writing: asyncio.Task[None] | None = None
        self._failure: CheckpointFailed | None = None
        self._metrics: dict[str, float] = {}

    async def restore(self) -> None:
        """Finished groups wait in the buffer again; the other draws are asked again, before all others.

        Raises ConfigError where the data is not that of the saved run.
        """
        if self._saved.cursor is not None:
            self._parts.source.restore(self._saved.cursor)
        restoring = self._parts.buffer.restore(self._saved.groups, self._saved.trained)
        await within(self._timeout_s, "the replay buffer to take up what was saved", restoring)
        self._ledger.check_draws(self._parts.source.counts())

    async def save(self, version: Version, engines: EngineSeconds, tasks: asyncio.TaskGroup) -> None:
        """Take the state, and write it in one of ``tasks``; one that is still being written is waited for first. A
        checkpoint that cannot be written is told and costs only itself.

        Args:
            engines: their seconds until now.
        """
        clock = self._parts.clock
        began = clock.now()
        await self._settle()
        try:
            state = await self._take(version, engines)
        except CheckpointFailed as error:
            self._tell(version, error)
        else:
            self._writing = tasks.create_task(self._write(state))
        self._metrics["timing_s/save_checkpoint"] = clock.now() - began

    async def save_last(
        self, version: Version, engines: EngineSeconds, tasks: asyncio.TaskGroup, *, is_needed: bool
    ) -> None:
        """Return once nothing is written any more and ``version`` can be gone on from; it is saved where it is not yet.

        Raises:
            CheckpointFailed: it cannot, and ``is_needed``.
        """
        await self._settle()
        if not self._is_saved(version):
            await self.save(version, engines, tasks)
            await self._settle()
        if is_needed and not self._is_saved(version):
            assert self._failure is not None  # else it would be saved
            raise self._failure

    def drain_metrics(self) -> dict[str, float]:
        """Of what was saved since the last call: how long that held the training up, and how long was written."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _is_saved(self, version: Version) -> bool:
        """What a run starts with is, once something was saved."""
        return self._saved.cursor is not None and self._saved.version == version

    async def _settle(self) -> None:
        if self._writing is not None:
            await asyncio.wait({self._writing})  # it has its own deadline

    async def _take(self, version: Version, engines: EngineSeconds) -> RunState:
        who = f"a copy of the state at step {version.step}"
        inside = self._ledger.agreeing(await within(self._timeout_s, who, self._parts.buffer.groups()))
        self._ledger.check_draws(self._parts.source.counts())
        state = RunState(
            version=version,
            cursor=self._parts.source.cursor(self._ledger.unfinished(inside)),
            groups=inside,
            trained=self._ledger.trained,
            groups_trained=self._ledger.groups_trained,
            dropped=dict(self._ledger.dropped),
            given_up=self._ledger.given_up,
            filtered=self._ledger.filtered,
            totals=self._totals.saved(self._parts.clock.now(), engines),
        )
        await within(self._timeout_s, who, self._parts.checkpoints.begin(state))
        return state

    async def _write(self, state: RunState) -> None:
        began = self._parts.clock.now()
        who = f"the checkpoint of step {state.version.step} to be written"
        try:
            await within(self._timeout_s, who, self._parts.checkpoints.finish(state))
        except CheckpointFailed as error:
            self._tell(state.version, error)
        else:
            self._saved = state
        self._metrics["timing_s/write_checkpoint"] = self._parts.clock.now() - began

    def _tell(self, version: Version, failure: CheckpointFailed) -> None:
        self._failure = failure
        self._parts.sink.event(f"no checkpoint of step {version.step}: {failure}")
