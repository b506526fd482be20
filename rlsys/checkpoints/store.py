"""A folder of checkpoints, each complete or not there, whenever the process is killed.

::

    step_40/                 stands: manifest.json names every file with its size and checksum
    .step_50.partial/        is being written; ``commit`` makes it step_50
    .step_40.replaced/       the step_40 of before, while a new one takes its place; put back if that does not happen
    .step_30.removed/        is being deleted
    .step_40.converted/      step_40 in another form, for a run that is being resumed (.partial: not yet whole)

A checkpoint of a higher step than the one just written is of a line that was given up (a run went on from an earlier
one, since it was damaged): it is removed, or a later run might go on from it.

Not safe for two writers at once: a run folder has one run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlsys.errors import CheckpointDamaged, CheckpointFailed

FORMAT = 1  # of the manifest
MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"step_(0|[1-9]\d*)")
_HIDDEN = re.compile(r"\.step_\d+\.(partial|replaced|removed|converted(\.partial)?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A checkpoint whose files are what its manifest says.

    Attributes:
        damaged: one sentence for each newer checkpoint that was passed over.
    """

    step: int
    path: Path
    damaged: tuple[str, ...] = ()


class CheckpointStore:
    """Checkpoints by step. ``begin`` gives a folder to write into; it counts from ``commit`` on.

    Args:
        root: folder of the checkpoints; made by the first ``begin``.
        keep: how many checkpoints are kept, the newest ones.

    Example:
        >>> store = CheckpointStore(Path(tempfile.mkdtemp()), keep=2)
        >>> _ = (store.begin(7) / "state").write_text("seven")
        >>> store.commit(7).name, store.newest().step
        ('step_7', 7)
    """

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep

    def begin(self, step: int) -> Path:
        """A fresh folder for the checkpoint of ``step``. What earlier attempts left, of any step, is removed.

        Raises:
            CheckpointFailed: the file system refuses.
        """
        folder = self._partial(step)
        try:
            self._put_back()
            for path in self._root.glob(".step_*"):
                if _HIDDEN.fullmatch(path.name):
                    shutil.rmtree(path)
            folder.mkdir(parents=True)
        except OSError as error:
            raise self._failed(folder, error) from error
        return folder

    def commit(self, step: int) -> Path:
        """Make the folder of ``begin(step)`` a checkpoint, in place of one of the same step; then remove the oldest.

        Everything is on the disk before the folder gets its name, and its name before an older one is removed.

        Raises:
            CheckpointFailed: the file system refuses (for example a full disk). The checkpoints before it stand, and
                no unfinished folder is left.
        """
        partial, final = self._partial(step), self._root / f"step_{step}"
        try:
            _write_manifest(partial, step)
            _sync_tree(partial)
            if final.exists():
                final.rename(self._hidden(step, "replaced"))
            partial.rename(final)
            _sync(self._root)
        except OSError as error:
            self.abandon(step)
            with suppress(OSError):
                self._put_back()
            raise self._failed(partial, error) from error
        try:
            self._remove_others(step)
        except OSError as error:
            raise CheckpointFailed(f"{final} stands, but an older checkpoint could not be removed: {error}") from error
        return final

    def abandon(self, step: int) -> None:
        """Remove the folder of ``begin(step)``, as far as the file system lets us."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint that stands, whole or not; None where there is none."""
        return max((step for step, _ in self._standing()), default=None)

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Raises:
            CheckpointDamaged: there are checkpoints, and all of them are damaged.
        """
        self._put_back()
        damaged: list[str] = []
        for step, path in sorted(self._standing(), reverse=True):
            try:
                verify(path)
            except CheckpointDamaged as error:
                damaged.append(str(error))
            else:
                return Found(step=step, path=path, damaged=tuple(damaged))
        if damaged:
            raise CheckpointDamaged(
                f"no checkpoint in {self._root} can be used: {' '.join(damaged)} "
                "Delete them to start from the beginning, or start a new run under another run.name."
            )
        return None

    def _standing(self) -> Iterator[tuple[int, Path]]:
        for path in self._root.glob("step_*"):
            name = _NAME.fullmatch(path.name)
            if name and path.is_dir():
                yield int(name[1]), path

    def _put_back(self) -> None:
        """A replacement that was killed between its two renames is undone."""
        for path in self._root.glob(".step_*.replaced"):
            name = path.name.removeprefix(".").removesuffix(".replaced")
            if not (self._root / name).exists():
                path.rename(self._root / name)

    def _remove_others(self, new: int) -> None:
        """All but the newest ``keep`` up to step ``new``, which has just been written."""
        replaced = self._hidden(new, "replaced")
        if replaced.exists():
            shutil.rmtree(replaced)
        standing = sorted(self._standing())
        kept = [step for step, _ in standing if step <= new][-self._keep :]
        for step, path in standing:
            if step not in kept:
                # renamed first: a kill half-way through the deletion must not leave half a checkpoint under its name
                removed = self._hidden(step, "removed")
                path.rename(removed)
                shutil.rmtree(removed)

    def _partial(self, step: int) -> Path:
        return self._hidden(step, "partial")

    def _hidden(self, step: int, state: str) -> Path:
        return self._root / f".step_{step}.{state}"

    def _failed(self, path: Path, error: OSError) -> CheckpointFailed:
        standing = ", ".join(str(step) for step, _ in sorted(self._standing())) or "none"
        return CheckpointFailed(
            f"checkpoint {path} could not be written: {error}. Checkpoints that stand, by step: {standing}. "
            "Free space there and resume."
        )


def verify(folder: Path) -> None:
    """Read every file that the manifest of a checkpoint names, and compare. Files that it does not name are nobody's
    business.

    Raises:
        CheckpointDamaged: in one sentence, what is wrong first.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT or f"step_{manifest['step']}" != folder.name:
            raise CheckpointDamaged(
                f"{folder} is damaged: its manifest is of format {manifest['format']} and step {manifest['step']}."
            )
        for name, wanted in manifest["files"].items():
            got = _entry(folder / name)
            if got != wanted:
                raise CheckpointDamaged(f"{folder} is damaged: {name} is {got}, and its manifest wants {wanted}.")
    except OSError as error:
        raise CheckpointDamaged(f"{folder} is damaged: {error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # not JSON, or not of our shape
        raise CheckpointDamaged(f"{folder} is damaged: {MANIFEST} cannot be read ({error!r}).") from error


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _entry(path: Path) -> dict[str, Any]:
    """Size in bytes and xxh3_64 of a file."""
    digest = xxhash.xxh3_64()
    num_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return {"bytes": num_bytes, "xxh3_64": digest.hexdigest()}


def _sync_tree(folder: Path) -> None:
    """Everything below ``folder``, and itself, to the disk: contents before the folders that name them."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
