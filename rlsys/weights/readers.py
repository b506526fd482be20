"""Readers of recycled segments, kept from one version to the next.

A fresh mapping costs a page fault for every few pages at the first look: on some machines as much again as copying what
it shows, and with small models more than all the rest. Pages that stay mapped count as the process's memory, though
they are the segment's.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlsys.records import TensorEntry
from rlsys.weights.pool import NUM_SEGMENTS
from rlsys.weights.segment import SegmentReader


class SegmentReaders:
    """One reader for each segment. Not for two threads at once.

    Example:
        >>> SegmentReaders().open("/dev/shm/gone", ())
        Traceback (most recent call last):
        rlsys.errors.WeightsRefused: segment /dev/shm/gone cannot be mapped: ...
    """

    def __init__(self) -> None:
        self._kept: dict[str, SegmentReader] = {}

    def open(self, segment: str, tensors: Sequence[TensorEntry]) -> SegmentReader:
        """A reader of the version. What an earlier one of the segment has handed out shows this version, too.

        Raises WeightsRefused as ``SegmentReader`` does.
        """
        reader = self._kept.pop(segment, None)
        if reader is None or not reader.renew(tensors):
            reader = SegmentReader(segment, tensors)
        self._kept[segment] = reader
        while len(self._kept) > NUM_SEGMENTS:  # those of a mirror that is gone
            del self._kept[next(iter(self._kept))]
        return reader
