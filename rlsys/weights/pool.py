"""Which weight segment may be overwritten: bookkeeping only, no files.

A segment is free unless it is being written, is being read, or holds the newest version. With two segments one is
written while the other is read.
"""

from __future__ import annotations

from collections.abc import Sequence

NUM_SEGMENTS = 2  # one to read, one to write


class SegmentPool:
    """Segments by name, handed out for writing and protected while they are read.

    Args:
        names: paths of the segments, at least two: with one, nothing could be written while its version is the newest.

    Example:
        >>> pool = SegmentPool(["a", "b"])
        >>> first = pool.acquire(); pool.publish(first)
        >>> pool.acquire(), pool.acquire()
        ('b', None)
    """

    def __init__(self, names: Sequence[str]) -> None:
        if len(set(names)) != len(names) or len(names) < NUM_SEGMENTS:
            raise ValueError(f"need at least {NUM_SEGMENTS} distinct segment names, got {list(names)}")
        self._num_readers = dict.fromkeys(names, 0)
        self._writing: set[str] = set()
        self._readable: set[str] = set()
        self._newest: str | None = None

    @property
    def newest(self) -> str | None:
        """The segment of the newest published version; None before the first."""
        return self._newest

    def acquire(self) -> str | None:
        """Take a free segment to write into; None when there is none. What it held is no longer readable."""
        for name, num_readers in self._num_readers.items():
            if num_readers == 0 and name not in self._writing and name != self._newest:
                self._writing.add(name)
                self._readable.discard(name)
                return name
        return None

    def publish(self, name: str) -> None:
        """The acquired segment now holds the newest version; the one before it is protected by its readers only."""
        if name not in self._writing:
            raise ValueError(f"segment {name} was not acquired")
        self._writing.remove(name)
        self._readable.add(name)
        self._newest = name

    def abandon(self, name: str) -> None:
        """The acquired segment was not written to its end: it is free, and holds nothing."""
        if name not in self._writing:
            raise ValueError(f"segment {name} was not acquired")
        self._writing.remove(name)

    def add_reader(self, name: str) -> None:
        """Somebody starts to read. Raises ValueError where the segment holds no published version (any more)."""
        if name not in self._readable:
            raise ValueError(f"segment {name} holds no published version, so it cannot be read")
        self._num_readers[name] += 1

    def remove_reader(self, name: str) -> None:
        """Somebody ended reading. Raises ValueError where nobody reads."""
        if not self._num_readers.get(name):
            raise ValueError(f"segment {name} has no reader to remove")
        self._num_readers[name] -= 1
