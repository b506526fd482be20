"""Stopping and going on: what of a run is kept in a checkpoint, beside the learner's weights, and how it comes back.

The learner stands still between two steps while the state is taken. The loops around it go on: a group that is on its
way into the buffer or out of it at that moment is saved as a question that is asked again.
"""

from __future__ import annotations

from dataclasses import replace

from rlsys.controller.deadline import within
from rlsys.controller.ledger import Ledger
from rlsys.controller.parts import Parts
from rlsys.controller.roster import EngineSeconds
from rlsys.controller.state import RunState
from rlsys.controller.totals import Totals
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

    def is_saved(self, version: Version) -> bool:
        """Whether ``version`` can be gone on from. What a run starts with can, once something was saved."""
        return self._saved.cursor is not None and self._saved.version == version

    async def restore(self) -> None:
        """Finished groups wait in the buffer again; the other draws are asked again, before all others.

        Raises ConfigError where the data is not that of the saved run.
        """
        if self._saved.cursor is not None:
            self._parts.source.restore(self._saved.cursor)
        restoring = self._parts.buffer.restore(self._saved.groups, self._saved.trained)
        await within(self._timeout_s, "the replay buffer to take up what was saved", restoring)
        self._ledger.check_draws(self._parts.source.counts())

    async def save(self, version: Version, engines: EngineSeconds) -> None:
        """Raises CheckpointFailed; what was saved before still stands.

        Args:
            engines: their seconds until now.
        """
        who = f"the checkpoint of step {version.step}"
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
        await within(self._timeout_s, who, self._parts.checkpoints.save(state))
        self._saved = state
