"""Where a step's metrics are kept: metrics.jsonl, TensorBoard, and all of them at once."""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlsys.observe.append_file import AppendFile
from rlsys.observe.plain_json import as_plain_json
from rlsys.records import Version


class Tracker(Protocol):
    def step(self, step: int, version: Version, time_s: float, metrics: Mapping[str, float]) -> None:
        """Keep one step's metrics. Returns at once, and holds what a full disk does not take. ``time_s``: seconds since
        the run began."""
        ...

    def retry(self) -> list[str]:
        """Write what is held, where the disk takes it. Returns sentences for the person who watches."""
        ...

    def close(self) -> list[str]:
        """The same for the last time."""
        ...


class MetricsFile:
    """One flat JSON object a step, on a line of its own, readable as soon as the step is done.

    "step", "version" and "time_s" come first and are reserved. A number that is not finite is written as null.
    """

    def __init__(self, path: Path) -> None:
        self._file = AppendFile(path)

    def step(self, step: int, version: Version, time_s: float, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "version": str(version), "time_s": round(time_s, 3)}
        row = as_plain_json({**row, **metrics, **row})
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def retry(self) -> list[str]:
        return self._file.retry()

    def close(self) -> list[str]:
        return self._file.close()


class TensorBoard:
    """Event files for TensorBoard. Numbers that are not finite are left out.

    Of tensorboardX only the records are used: its writer hands them to a thread that dies of a full disk, and then
    blocks whoever writes on, for ever.
    """

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        # slow to import, and not needed where TensorBoard is off
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

        self._event, self._summary, self._scalar, self._checksum = Event, Summary, scalar, masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        self._file = AppendFile(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}")
        self._write(file_version="brain.Event:2")  # what TensorBoard expects first
        # a resumed run trains steps again: TensorBoard leaves out what older files say from this step on
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def step(self, step: int, version: Version, time_s: float, metrics: Mapping[str, float]) -> None:
        finite = [self._scalar(name, value) for name, value in metrics.items() if math.isfinite(value)]
        self._write(step=step, summary=self._summary(value=[value for one in finite for value in one.value]))

    def retry(self) -> list[str]:
        return self._file.retry()

    def close(self) -> list[str]:
        return self._file.close()

    def _write(self, **event: Any) -> None:
        """One record: length, checksum of that, the event, checksum of that; integers little-endian."""
        data = self._event(wall_time=time.time(), **event).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        self._file.write(length + checksums[0] + data + checksums[1])


class Trackers:
    """Hands each step to every tracker, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def step(self, step: int, version: Version, time_s: float, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.step(step, version, time_s, metrics)

    def retry(self) -> list[str]:
        return [text for tracker in self._trackers for text in tracker.retry()]

    def close(self) -> list[str]:
        return [text for tracker in self._trackers for text in tracker.close()]
