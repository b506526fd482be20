"""A file that is only ever appended to, by a run that a full disk must not stop."""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path

MAX_HELD = 10_000  # records that wait in memory for a disk that takes them; beyond that the oldest go and are counted


class AppendFile:
    """Takes whole records and never raises for them. One that cannot be written is held in memory, in its order, and
    written as soon as the disk takes it; a part of one that was written is cut off again, so that readers find whole
    records only. Any thread may call it.

    Attributes:
        num_held: records that wait.
        num_lost: records given up since more than ``max_held`` waited.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, max_held: int = MAX_HELD) -> None:
        self.num_lost = 0
        self._path, self._max_held = path, max_held
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._held: deque[bytes] = deque()
        self._reason = ""
        self._told_of_failure = False
        self._lock = threading.Lock()

    @property
    def num_held(self) -> int:
        return len(self._held)

    def write(self, record: bytes) -> None:
        """Append one record now, or later."""
        with self._lock:
            self._held.append(record)
            if len(self._held) > self._max_held:
                self._held.popleft()
                self.num_lost += 1
        self._write_held()

    def retry(self) -> list[str]:
        """Write what is held, where the disk takes it. Returns what the person who watches should know: one sentence
        when writing begins to fail, one when it works again, else nothing."""
        self._write_held()
        if bool(self._held) == self._told_of_failure:
            return []
        self._told_of_failure = not self._told_of_failure
        if self._told_of_failure:
            kept = f"the last {self._max_held:,} entries are kept in memory until they can be written"
            return [f"{self._path.name} cannot be written ({self._reason}); the run goes on, {kept}"]
        lost = f"{self.num_lost:,} entries in all are lost" if self.num_lost else "nothing is lost"
        return [f"{self._path.name} is written again; {lost}"]

    def sync(self) -> None:
        """Bring every record to the disk. Raises OSError where it does not take them."""
        self._write_held()
        if self._held:
            raise OSError(f"{len(self._held):,} entries of {self._path} are not written ({self._reason})")
        os.fsync(self._fd)

    def close(self) -> list[str]:
        """Write what is held, where the disk takes it, and close. Returns a sentence about what was not written."""
        self._write_held()
        try:
            os.close(self._fd)
        except OSError as error:  # a network file system may tell only now that its disk is full
            return [f"the end of {self._path.name} may be missing ({error.strerror})"]
        if not self._held:
            return []
        return [f"the last {len(self._held):,} entries of {self._path.name} are not written ({self._reason})"]

    def _write_held(self) -> None:
        with self._lock:
            try:
                while self._held:
                    self._append(self._held[0])
                    self._held.popleft()
            except OSError as error:
                self._reason = str(error.strerror)

    def _append(self, record: bytes) -> None:
        written = 0
        try:
            while written < len(record):
                written += os.write(self._fd, record[written:])
        except OSError:
            if written:
                self._cut_off(written)
            raise

    def _cut_off(self, num_bytes: int) -> None:
        """Take back the last ``num_bytes``, unless another process has written behind them."""
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        if os.fstat(self._fd).st_size == end:
            os.ftruncate(self._fd, end - num_bytes)
