"""Where a step's metrics are kept: metrics.jsonl, TensorBoard, and all of them at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rlsys.observe.plain_json import as_plain_json
from rlsys.records import Version


class Tracker(Protocol):
    def step(self, step: int, version: Version, time_s: float, metrics: Mapping[str, float]) -> None:
        """Keep one step's metrics. ``time_s``: seconds since the run began. Raises OSError where it cannot."""
        ...

    def close(self) -> None: ...


class MetricsFile:
    """One flat JSON object a step, on a line of its own, readable as soon as the step is done.

    "step", "version" and "time_s" come first and are reserved. A number that is not finite is written as null.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def step(self, step: int, version: Version, time_s: float, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "version": str(version), "time_s": round(time_s, 3)}
        row = as_plain_json({**row, **metrics, **row})
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard. Numbers that are not finite are left out."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter  # slow to import, and not needed where TensorBoard is off

        self._writer = SummaryWriter(logdir=str(folder))  # type: ignore[no-untyped-call]

    def step(self, step: int, version: Version, time_s: float, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, float(value), step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


class Trackers:
    """Hands each step to every tracker, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def step(self, step: int, version: Version, time_s: float, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.step(step, version, time_s, metrics)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
