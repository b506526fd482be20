"""Everything the controller reports, handed on to whoever keeps or shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from rlsys.observe.append_file import AppendFile
from rlsys.observe.lineage import CommitLog
from rlsys.observe.progress import Progress
from rlsys.observe.rollout_log import RolloutLog
from rlsys.observe.trackers import Tracker
from rlsys.records import RolloutGroup, Version


class Gauges(Protocol):
    def set(self, values: Mapping[str, float]) -> None:
        """Take over present values by metric name; must not block."""
        ...


class RunSink:
    """Called from the controller's event loop, so it never waits: rollouts and the progress view are written by threads
    of their own, a step is one short line to a file. What a full disk does not take is held and written later; the
    person who watches is told of it."""

    def __init__(
        self,
        *,
        trackers: Tracker,
        progress: Progress,
        log: AppendFile,
        commits: CommitLog,
        rollout_log: RolloutLog | None = None,
        elapsed_s: float = 0.0,
        gauges: Gauges | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            trackers: get each step, with the seconds since the run began.
            log: gets each event, with the time of day.
            commits: gets the draws of each step.
            elapsed_s: seconds since the run began, of a run that was resumed.
            rollout_log: None where no rollouts are kept.
            gauges: None where nobody collects them.
        """
        self._trackers, self._progress, self._log = trackers, progress, log
        self._rollout_log, self._gauges = rollout_log, gauges
        self._commits = commits
        self._clock, self._began = clock, clock() - elapsed_s
        self._told_of_failure = False

    def step(self, step: int, version: Version, metrics: Mapping[str, float]) -> None:
        self._trackers.step(step, version, self._clock() - self._began, metrics)
        self._look_after_files()
        self._progress.step(step, version, metrics)
        if self._gauges is not None:
            self._gauges.set({"step": step, **metrics})

    def commit(self, version: Version, draws: Sequence[str]) -> None:
        self._commits.write(version, draws)

    def sync_commits(self) -> None:
        """Raises OSError where the disk is full."""
        self._commits.sync()

    def rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """``step``: the one at which they were trained, from which their staleness counts."""
        if self._rollout_log is None:
            return
        self._rollout_log.write(step, groups)
        if self._rollout_log.failure is not None and not self._told_of_failure:
            self._told_of_failure = True
            self.event(f"sampled rollouts are no longer written: {self._rollout_log.failure}")

    def event(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode(errors="replace"))
        self._progress.event(text)

    def live(self, values: Mapping[str, float]) -> None:
        self._look_after_files()
        self._progress.live(values)
        if self._gauges is not None:
            self._gauges.set(values)

    def close(self, summary: str = "") -> None:
        """Write out what is pending; ``summary`` is the last word to the person who watches."""
        if self._rollout_log is not None:
            self._rollout_log.close()
            if self._rollout_log.num_skipped:
                self.event(f"{self._rollout_log.num_skipped} sampled rollouts were not written: the disk was too slow")
        for text in (*self._trackers.close(), *self._commits.close(), *self._log.close()):
            self._progress.event(text)
        self._progress.close(summary)

    def _look_after_files(self) -> None:
        """Write what could not be written before. The progress view tells of a full disk: it needs none."""
        for text in (*self._trackers.retry(), *self._commits.retry(), *self._log.retry()):
            self.event(text)
