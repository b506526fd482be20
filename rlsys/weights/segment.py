"""A weight version in shared memory: a file on a memory file system that writer and readers map.

The file is recycled: it grows when a version needs more room and never shrinks, so its pages stay allocated and a
reader of an older manifest never loses the ground it stands on.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import xxhash

from rlsys.errors import WeightsRefused
from rlsys.records import TensorEntry
from rlsys.weights.owner import is_process_alive, remove_with_owner

SHM_FOLDER = Path("/dev/shm")
ALIGNMENT_BYTES = 64  # a cache line, and the widest vector register
GROWTH_BYTES = 4 << 20  # a file grows by whole multiples of this
_PREFIX = "rlsys"
_SEPARATOR = "@"  # occurs in no run name
_PLACE = itemgetter(slice(TensorEntry._fields.index("checksum")))  # of an entry, all before its checksum
# Of /proc/self/pagemap, as Linux documents it (admin-guide/mm/pagemap): one entry of 64 bits for each page.
_PAGE_ENTRY_BYTES = 8
_IN_MEMORY_OR_SWAP, _OF_A_FILE = np.uint64(0b11 << 62), np.uint64(1 << 61)


def segment_path(run: str, name: str, *, folder: Path = SHM_FOLDER, pid: int | None = None) -> Path:
    """Path of a segment. It carries the process id of its owner (this process, unless given), so that what a killed
    run left behind can be found."""
    parts = (_PREFIX, run, str(os.getpid() if pid is None else pid), name)
    return folder / _SEPARATOR.join(parts)


def own_segments(run: str, label: str, num: int) -> list[str]:
    """Paths of ``num`` segments of this process, not yet made: they go when it ends, however. What dead runs left on
    this machine goes now.

    Args:
        label: tells them from other segments of the run.
    """
    remove_stale_segments()
    paths = [segment_path(run, f"{label}-{number}") for number in range(num)]
    remove_with_owner(paths, os.getpid())
    return [str(path) for path in paths]


def stale_segments(folder: Path = SHM_FOLDER) -> tuple[Path, ...]:
    """The segments whose owners are dead."""
    return tuple(path for path, _, pid in _segments(folder) if not is_process_alive(pid))


def remove_stale_segments(folder: Path = SHM_FOLDER) -> tuple[Path, ...]:
    """Delete the segments whose owners are dead; returns what was deleted."""
    return _delete(stale_segments(folder))


def remove_segments(run: str, folder: Path = SHM_FOLDER) -> tuple[Path, ...]:
    """Delete the segments of a run, whoever owns them; returns what was deleted."""
    return _delete([path for path, owner_run, _ in _segments(folder) if owner_run == run])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a tensor goes in a segment.

    Attributes:
        of: name, dtype and shape of the tensor before it is cast.
        facts: what its entry says before the checksum.
        end: where its bytes end in the segment.
        target, buffer: the same bytes of the segment, to copy into and to compute the checksum of.
    """

    of: tuple[str, torch.dtype, torch.Size]
    facts: tuple[str, tuple[int, ...], str, int, int]
    end: int
    target: torch.Tensor
    buffer: memoryview


class SegmentWriter:
    """Writes versions into a segment: cast and copied in one pass, straight into the mapped bytes.

    Keep it for the next version: the mapping stays, so that writing again touches no fresh page.

    Args:
        path: the segment; made if missing, recycled otherwise.
        dtype: the engine's precision, into which floating-point tensors are cast.
    """

    def __init__(self, path: Path | str, dtype: torch.dtype) -> None:
        self._path, self._dtype = path, dtype
        self._map: mmap.mmap | None = None
        self._has_grown = False  # in this version
        self._places: list[_Place] = []  # versions are alike: found once, kept for the next one
        self._entries: list[TensorEntry] = []

    def write(self, bucket: Mapping[str, torch.Tensor]) -> None:
        """Append tensors by their names (any device, any strides). Raises OSError where the memory file system is
        full."""
        if not bucket:
            return
        first = len(self._entries)
        places = [self._place(index, name, bucket[name]) for index, name in enumerate(bucket, start=first)]
        with torch.no_grad():
            torch._foreach_copy_([place.target for place in places], [*bucket.values()])
        digest = xxhash.xxh3_64_intdigest
        self._entries += [TensorEntry(*place.facts, digest(place.buffer)) for place in places]

    def finish(self) -> tuple[TensorEntry, ...]:
        """End this version; returns its manifest, in the order of writing. The next ``write`` begins the next one."""
        entries, self._entries = tuple(self._entries), []
        if self._has_grown:  # places lie in mappings of every size on the way
            self._places, self._has_grown = [], False
        return entries

    def _place(self, index: int, name: str, tensor: torch.Tensor) -> _Place:
        """Where a version's tensor of this index goes: as in the version before, unless that had another one here."""
        of = (name, tensor.dtype, tensor.shape)
        if index < len(self._places):
            if self._places[index].of == of:
                return self._places[index]
            del self._places[index:]
        end = self._places[-1].end if self._places else 0
        offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        num_bytes = tensor.numel() * dtype.itemsize
        mapped = self._map_up_to(offset + num_bytes)
        place = _Place(
            of=of,
            facts=(name, tuple(tensor.shape), str(dtype).removeprefix("torch."), offset, num_bytes),
            end=offset + num_bytes,
            target=torch.frombuffer(mapped, dtype=dtype, count=tensor.numel(), offset=offset).view(tensor.shape),
            buffer=memoryview(mapped)[offset : offset + num_bytes],
        )
        self._places.append(place)
        return place

    def _map_up_to(self, end: int) -> mmap.mmap:
        if self._map is None or end > len(self._map):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                size_bytes = max(-(-end // GROWTH_BYTES) * GROWTH_BYTES, os.fstat(fd).st_size)
                # allocates the pages: a full file system is an OSError here, not a SIGBUS in the middle of the copy
                os.posix_fallocate(fd, 0, size_bytes)
                self._map = mmap.mmap(fd, size_bytes)  # the one before goes with its last view
                self._has_grown = True
            finally:
                os.close(fd)
        return self._map


class SegmentReader:
    """Reads a version from a segment, without copying it.

    Args:
        segment: path of the segment.
        tensors: the manifest.

    Raises:
        WeightsRefused: the segment is gone, or the manifest does not fit into it.
    """

    def __init__(self, segment: str, tensors: Sequence[TensorEntry]) -> None:
        self._segment, self._tensors = segment, tuple(tensors)
        self._places = [*map(_PLACE, tensors)]
        try:
            with open(segment, "rb") as file:
                self._file = _identity(os.fstat(file.fileno()))
                # a private mapping: torch gets the writable buffer it asks for, the segment itself cannot be changed
                self._map = mmap.mmap(file.fileno(), self.size_bytes, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise WeightsRefused(f"segment {segment} cannot be mapped: {error}") from error
        for entry in self._tensors:
            self._check_bounds(entry, self.size_bytes)
        self._buffers: list[memoryview] = []
        self._views: list[tuple[str, torch.Tensor]] = []

    @property
    def size_bytes(self) -> int:
        """Of the segment, which may hold more than this version."""
        return self._file[-1]

    def renew(self, tensors: Sequence[TensorEntry]) -> bool:
        """Read another version that lies in the same places, by the same mapping. False where a new reader is needed:
        the file or the places are others, or somebody wrote into a view and has it apart from the segment since."""
        try:
            is_same_file = self._file == _identity(os.stat(self._segment))
        except OSError:
            return False
        is_alike = is_same_file and [*map(_PLACE, tensors)] == self._places
        if not is_alike or (self._views and self._has_own_pages()):
            return False
        self._tensors = tuple(tensors)
        return True

    def verify(self) -> None:
        """Compare every tensor's bytes with its checksum. Raises WeightsRefused naming the first that differs."""
        if not self._buffers:
            whole = memoryview(self._map)
            self._buffers = [whole[entry.offset : entry.offset + entry.num_bytes] for entry in self._tensors]
        for entry, buffer in zip(self._tensors, self._buffers, strict=True):
            got = xxhash.xxh3_64_intdigest(buffer)
            if got != entry.checksum:
                raise WeightsRefused(
                    f"tensor {entry.name} in {self._segment}: checksum of its {entry.num_bytes} bytes\n"
                    f"  got:    {got:#018x}\n  wanted: {entry.checksum:#018x}"
                )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, view into the segment). A view keeps the mapping alive, but not the bytes in it: they change
        when the segment is recycled."""
        if not self._views:
            self._views = [(entry.name, self._view(entry)) for entry in self._tensors]
        yield from self._views

    def _view(self, entry: TensorEntry) -> torch.Tensor:
        dtype = getattr(torch, entry.dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=prod(entry.shape), offset=entry.offset)
        return flat.view(entry.shape)

    @cached_property
    def _pages(self) -> tuple[int, int]:
        """The first page of the mapping, and how many hold the version."""
        first_byte = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        end = max(entry.offset + entry.num_bytes for entry in self._tensors)
        return first_byte // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)

    def _has_own_pages(self) -> bool:
        """Whether somebody wrote into a view: the mapping then has pages of its own, which no longer show the file.
        True also where the system does not tell."""
        first_page, num_pages = self._pages
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as file:
                found = os.pread(file.fileno(), num_pages * _PAGE_ENTRY_BYTES, first_page * _PAGE_ENTRY_BYTES)
        except OSError:
            return True
        pages = np.frombuffer(found, dtype=np.uint64)
        is_own = (pages & _OF_A_FILE == 0) & (pages & _IN_MEMORY_OR_SWAP != 0)
        return len(pages) != num_pages or bool(is_own.any())

    def _check_bounds(self, entry: TensorEntry, size_bytes: int) -> None:
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype) or prod(entry.shape) * dtype.itemsize != entry.num_bytes:
            raise WeightsRefused(
                f"tensor {entry.name} in {self._segment}: got {entry.num_bytes} bytes, "
                f"wanted those of shape {entry.shape} in {entry.dtype}"
            )
        if entry.offset < 0 or entry.offset + entry.num_bytes > size_bytes:
            raise WeightsRefused(
                f"tensor {entry.name} in {self._segment}: got bytes {entry.offset} to "
                f"{entry.offset + entry.num_bytes}, wanted them within the segment's {size_bytes}"
            )


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size


def _segments(folder: Path) -> Iterator[tuple[Path, str, int]]:
    for path in folder.glob(f"{_PREFIX}{_SEPARATOR}*"):
        parts = path.name.split(_SEPARATOR)
        if len(parts) == 4 and parts[2].isdigit():
            yield path, parts[1], int(parts[2])


def _delete(paths: Sequence[Path]) -> tuple[Path, ...]:
    for path in paths:
        path.unlink(missing_ok=True)
    return tuple(paths)
