"""Checkpoints of a run: the learner's ranks write theirs, this process the rest; the folder counts once all is on disk.
The learner stands still only while its ranks copy their state; they write the copies while it trains on.

step_40/learner/       what the learner needs (train/checkpoint)
        state.json     version, cursor of the source, counts, totals
        groups.npz     finished rollouts that wait to be trained
        manifest.json  every file with its checksum (checkpoints/store)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlsys.actors.learner import RayLearner
from rlsys.buffer.saved import groups_from_arrays, groups_to_arrays
from rlsys.checkpoints.store import CheckpointStore
from rlsys.controller.saving import gone_on_from
from rlsys.controller.state import RunState
from rlsys.errors import CheckpointDamaged, CheckpointFailed
from rlsys.observe.lineage import last_version
from rlsys.prompts.source import PromptSource
from rlsys.records import DropCause, Version

LEARNER, STATE, GROUPS = "learner", "state.json", "groups.npz"


class RunCheckpoints:
    """Writes checkpoints.

    Args:
        sync_commits: brings the record of trained draws to the disk; a checkpoint must not be newer than that record.
    """

    def __init__(self, store: CheckpointStore, learner: RayLearner, sync_commits: Callable[[], None]) -> None:
        self._store, self._learner, self._sync_commits = store, learner, sync_commits
        self._folder = Path()  # of the checkpoint under way

    async def begin(self, state: RunState) -> None:
        """The learner goes on once this returns. Raises CheckpointFailed where the file system refuses."""
        self._folder = await asyncio.to_thread(self._store.begin, state.version.step)
        await self._learner.save_checkpoint(str(self._folder / LEARNER))

    async def finish(self, state: RunState) -> None:
        """Raises CheckpointFailed where the file system refuses; nothing is left of the checkpoint then."""
        step, folder = state.version.step, self._folder
        try:
            await asyncio.to_thread(_write_state, state, folder)
            await self._learner.checkpoint_written()
            await asyncio.to_thread(self._commit, step)
        except OSError as error:
            raise CheckpointFailed(f"checkpoint {folder} could not be written: {error}") from error
        finally:
            await asyncio.to_thread(self._store.abandon, step)  # nothing is left of it where it was committed

    def _commit(self, step: int) -> None:
        self._sync_commits()
        self._store.commit(step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where a run begins.

    Attributes:
        state: the beginning, or what was saved.
        learner: folder of the learner's checkpoint; None at the beginning.
        told: sentences for the person who watches.
    """

    state: RunState
    learner: str | None = None
    told: tuple[str, ...] = ()


def find_start(store: CheckpointStore, commits: Path, source: PromptSource) -> Start:
    """What a resumed run goes on from: its newest checkpoint that is whole, or the beginning where there is none yet.

    Args:
        commits: the record of trained draws.

    Raises:
        CheckpointDamaged: there are checkpoints, and none can be used.
        ConfigError: the data is not that of the run.
    """
    last = last_version(commits)
    found = store.newest()
    if found is None:
        told = "there is no checkpoint yet: starting from the beginning"
        return Start(state=gone_on_from(RunState(), last), told=(told,))
    saved = _read_state(found.path, source)
    state = gone_on_from(saved, last)
    told = f"going on from the checkpoint of step {saved.version.step}, with {len(saved.groups)} finished groups"
    if state.version != saved.version and last is not None:
        told += (
            f"; what was trained after it, up to step {last.step}, is lost and trained again (version {state.version})"
        )
    return Start(state=state, learner=str(found.path / LEARNER), told=(*found.damaged, told))


def _write_state(state: RunState, folder: Path) -> None:
    arrays, groups = groups_to_arrays(state.groups)
    np.savez(folder / GROUPS, allow_pickle=False, **arrays)
    plain = {
        "version": str(state.version),
        "cursor": state.cursor,
        "trained": state.trained,
        "groups_trained": state.groups_trained,
        "dropped": {cause.value: number for cause, number in state.dropped.items()},
        "given_up": state.given_up,
        "filtered": state.filtered,
        "totals": state.totals,
        "groups": groups,
    }
    (folder / STATE).write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")


def _read_state(folder: Path, source: PromptSource) -> RunState:
    try:
        plain = json.loads((folder / STATE).read_text(encoding="utf-8"))
        source.check_cursor(plain["cursor"])  # first: a draw means nothing in other data
        with np.load(folder / GROUPS, allow_pickle=False) as arrays:
            groups = groups_from_arrays(dict(arrays), plain["groups"], source.draw)
        return RunState(
            version=Version.parse(plain["version"]),
            cursor=plain["cursor"],
            groups=groups,
            trained=plain["trained"],
            groups_trained=plain["groups_trained"],
            dropped={DropCause(cause): number for cause, number in plain["dropped"].items()},
            given_up=plain["given_up"],
            filtered=plain["filtered"],
            totals=plain["totals"],
        )
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointDamaged(
            f"{folder} was written by another version of rlsys, or is damaged: {type(error).__name__}: {error}"
        ) from error
