"""Copies of the state that is saved, and the thread that writes them while the training goes on.

A snapshot is one copy in host memory, as large as this rank's part of the checkpoint. The memory is taken by the first
snapshot and used again by every later one: taking it costs several times as much as filling it.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsys.train.checkpoint import Written

_COPY_ERRORS = (RuntimeError, MemoryError)  # no memory: the first is torch's
_WRITE_ERRORS = (OSError, RuntimeError)  # a full disk is the first to Python's files, the second to torch's own


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in host memory of their own."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@dataclass(slots=True)
class Snapshot:
    """What is to be written.

    Attributes:
        texts: by path.
        files: each path with what ``torch.save`` writes there.
        failure: why it is not complete; empty where it is.
    """

    texts: dict[Path, str] = field(default_factory=dict)
    files: list[tuple[Path, Any]] = field(default_factory=list)
    failure: str = ""


class HostMemory:
    """Memory that snapshots are copied into, one after another: a snapshot is overwritten by the next one.

    Example:
        >>> memory, state = HostMemory(), {"weights": torch.ones(2)}
        >>> memory.rewind(); kept = memory.copy(state)
        >>> _ = state["weights"].zero_()
        >>> kept["weights"].tolist()
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._num_used = 0

    def rewind(self) -> None:
        """Begin a new snapshot; that of before is given up."""
        self._num_used = 0

    def copy(self, state: Any) -> Any:
        """``state`` with every tensor copied, in dicts, lists and tuples. Tensors that share memory share it again."""
        return self._copy(state, {})

    def _copy(self, value: Any, copied: dict[int, torch.UntypedStorage]) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value, copied)
        if isinstance(value, dict):
            result = copy.copy(value)  # a state_dict carries more than its items
            for key, item in value.items():
                result[key] = self._copy(item, copied)
            return result
        if type(value) in (list, tuple):
            return type(value)(self._copy(item, copied) for item in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, value: Tensor, copied: dict[int, torch.UntypedStorage]) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in copied:
            block = self._block(storage.nbytes(), is_pinned=value.is_cuda)
            block.copy_(storage)
            copied[storage._cdata] = block
        whole = torch.empty(0, dtype=value.dtype)
        return whole.set_(copied[storage._cdata], value.storage_offset(), value.size(), value.stride())

    def _block(self, num_bytes: int, *, is_pinned: bool) -> torch.UntypedStorage:
        """The next one; states of the same shape ask for the same blocks in the same order."""
        index, self._num_used = self._num_used, self._num_used + 1
        if index == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        if self._blocks[index].numel() != num_bytes:
            self._blocks[index] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        return self._blocks[index].untyped_storage()


class CheckpointTaker:
    """In place of DeepSpeed's writer of files, while a checkpoint is taken: keeps copies and writes nothing.

    A failure is kept instead of raised: ``save_checkpoint`` is a row of collectives with a write between two of them,
    and a rank that raised would leave the others waiting for it until the deadline.
    """

    def __init__(self, wrapped: Any, memory: HostMemory, snapshot: Snapshot) -> None:
        self._wrapped, self._memory, self._snapshot = wrapped, memory, snapshot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folders are made when the files are written."""

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self._snapshot.files.append((Path(path), self._memory.copy(state_dict)))
        except _COPY_ERRORS as error:
            self._snapshot.failure = repr(error)


class BackgroundWriter:
    """Writes snapshots, one at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._written: Written | None = None

    def write(self, snapshots: Sequence[Snapshot]) -> None:
        """Begin to write. The one before has ended."""
        assert self._thread is None or not self._thread.is_alive(), "two checkpoints at once"
        self._written = None
        self._thread = threading.Thread(target=self._write, args=(tuple(snapshots),), daemon=True)
        self._thread.start()

    def written(self, wait_s: float = 0.0) -> Written | None:
        """How the last one ended; None where it is still under way after ``wait_s`` seconds."""
        if self._thread is not None:
            self._thread.join(wait_s)
        return self._written

    def _write(self, snapshots: Sequence[Snapshot]) -> None:
        began = time.perf_counter()
        failure = ""
        for snapshot in snapshots:
            failure = failure or snapshot.failure or _failure_to_write(snapshot)
        self._written = Written(seconds=time.perf_counter() - began, failure=failure)


def _failure_to_write(snapshot: Snapshot) -> str:
    """Write the files. Returns what went wrong as text, or nothing: the error itself would keep torch's half-done
    writer alive, and that flushes what it still holds when it goes, into a file of the same name that was written
    since."""
    try:
        for path, text in snapshot.texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for path, state in snapshot.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
    except _WRITE_ERRORS as error:
        first: BaseException = error
        while first.__context__ is not None:  # what the disk said; torch says only that its file is too short
            first = first.__context__
        return repr(first)
    return ""
