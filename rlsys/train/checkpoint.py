"""What the learner keeps on disk: DeepSpeed's own checkpoint, and what DeepSpeed leaves out.

::

    layout.json        how it is spread (rank 0); read without torch, so before an actor starts
    base.json          which model holds what was not trained (rank 0), where something was not (train/base)
    deepspeed/         weights, optimizer and learning-rate schedule, as DeepSpeed writes them, every rank its part
    rank_<rank>.pt     torch's generators of each rank, and what else it holds of its own
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlsys.config.schema import TrainSection
from rlsys.errors import CheckpointDamaged, CheckpointFailed, ConfigError
from rlsys.train.base import write_base

_LAYOUT = "layout.json"
_TAG = "deepspeed"  # DeepSpeed's name for the folder that it writes into
_WRITE_ERRORS = (OSError, RuntimeError)  # a full disk is the first to Python's files, the second to torch's own


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the learner's state was spread when it was saved. DeepSpeed reads it back on the same layout only."""

    ranks: int
    zero_stage: int
    tensor_parallel: int = 1
    expert_parallel: int = 1
    sequence_parallel: int = 1

    @classmethod
    def of(cls, train: TrainSection, *, world_size: int) -> Layout:
        """That of a section of the configuration, over so many processes."""
        return cls(
            ranks=world_size * train.ranks // train.processes,
            zero_stage=train.zero_stage,
            tensor_parallel=train.tensor_parallel,
            expert_parallel=train.expert_parallel,
            sequence_parallel=train.sequence_parallel,
        )


def saved_layout(folder: Path | str) -> Layout:
    """The layout of a saved learner. Raises CheckpointDamaged where there is none."""
    path = Path(folder) / _LAYOUT
    try:
        return Layout(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error


def check_layout(folder: Path | str, layout: Layout) -> None:
    """Refuse a learner in ``folder`` that was saved under another layout. Raises ConfigError."""
    saved = saved_layout(folder)
    for key in ("ranks", "tensor_parallel", "expert_parallel", "sequence_parallel", "zero_stage"):
        got, wanted = getattr(layout, key), getattr(saved, key)
        if got != wanted:
            raise ConfigError(
                f"train.{key}",
                str(got),
                f"{wanted}, as in the checkpoint {folder}",
                f"Resume with train.{key}={wanted}, or start a new run from the model that the other one saved.",
            )


def save_state(
    engine: Any,
    folder: Path | str,
    *,
    rank: int,
    layout: Layout,
    device: str,
    own: Mapping[str, Any],
    base: Mapping[str, str] | None = None,
) -> None:
    """Write the state of every rank into ``folder``, which they all see. A collective: all files are there when it
    returns, on every rank.

    Args:
        engine: DeepSpeed's.
        own: plain values and tensors of this rank, which ``load_state`` gives back.
        base: fingerprints of the files that hold what is frozen, which is left out here; None: nothing is left out.

    Raises:
        CheckpointFailed: on every rank alike, where one of them could not write. The engine can go on.
    """
    failure: str | None = None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _save_own(Path(folder), rank, layout, device, own)
        if base is not None and rank == 0:
            write_base(folder, base)
    except _WRITE_ERRORS as error:
        failure = repr(error)
    _agree(failure, folder, device)
    writer = _ToldWriter(engine.checkpoint_engine)
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = _copy_nothing
    try:
        left_out = base is not None
        engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=left_out)
    finally:
        engine.checkpoint_engine = writer.wrapped
    _agree(writer.failure, folder, device)


def load_state(engine: Any, folder: Path | str, *, rank: int, device: str) -> Mapping[str, Any]:
    """Take up the state that ``save_state`` wrote, into a new engine of the same layout. A collective.

    Returns:
        What ``save_state`` was given as ``own``.

    Raises:
        CheckpointDamaged: there are no files of DeepSpeed's.
    """
    import torch

    path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if path is None:
        raise CheckpointDamaged(f"{folder} holds no learner: DeepSpeed finds none of its files in {_TAG}/")
    of_rank = torch.load(_rank_path(Path(folder), rank), weights_only=True)
    torch.set_rng_state(of_rank["generators"]["cpu"])
    if device == "cuda":
        torch.cuda.set_rng_state(of_rank["generators"]["cuda"])
    own: Mapping[str, Any] = of_rank["own"]
    return own


class _ToldWriter:
    """DeepSpeed's writer of files, except that a failure is kept instead of raised.

    ``save_checkpoint`` is a row of collectives with a write between two of them: a rank that raised would leave the
    others waiting for it until the deadline.

    The failure is kept as text. The error itself would keep torch's half-done writer alive, and that flushes what it
    still holds when it goes: into a file of the same name that was written since.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.failure: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.wrapped.save(state_dict, path)
        except _WRITE_ERRORS as error:
            self.failure = repr(error)


def _copy_nothing(folder: str) -> None:
    """In place of DeepSpeed's copying of two of its own scripts into every checkpoint."""


def _save_own(folder: Path, rank: int, layout: Layout, device: str, own: Mapping[str, Any]) -> None:
    import torch

    if rank == 0:
        (folder / _LAYOUT).write_text(json.dumps(asdict(layout)) + "\n")
    generators = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state()
    torch.save({"generators": generators, "own": dict(own)}, _rank_path(folder, rank))


def _rank_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.pt"


def _agree(failure: str | None, folder: Path | str, device: str) -> None:
    """Raise on every rank where one of them failed. A collective."""
    from rlsys.train import parallel

    if parallel.on_any_rank(failure is not None, device):
        what = failure or "another rank failed"
        raise CheckpointFailed(f"the learner's part of {folder} could not be written: {what}. Free space there.")
