"""What the learner keeps on disk: DeepSpeed's own checkpoint, and what DeepSpeed leaves out.

::

    layout.json        how it is spread (rank 0); read without torch, so before an actor starts
    model.json         what the model is (rank 0), likewise
    base.json          which model holds what was not trained (rank 0), where something was not (train/base)
    deepspeed/         weights, optimizer and learning-rate schedule, as DeepSpeed writes them, every rank its part
    rank_<rank>.pt     torch's generators of each rank, and what else it holds of its own
    critic/            the same for the critic, where there is one
    universal/         in place of deepspeed/, in a learner that was converted (train/universal)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config.schema import TrainSection
from rlsys.errors import CheckpointDamaged, ConfigError
from rlsys.train.base import BASE_FILE, base_text

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.train.snapshot import HostMemory, Snapshot

_LAYOUT, MODEL_FILE = "layout.json", "model.json"
CRITIC_FOLDER = "critic"  # the same once more, below the policy's
DEEPSPEED_TAG, UNIVERSAL_TAG = "deepspeed", "universal"  # folders, as DeepSpeed is told their names


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

    @property
    def processes_a_rank(self) -> int:
        """Of a data-parallel rank; they stand in a row."""
        return self.tensor_parallel * self.sequence_parallel

    @property
    def shares_out(self) -> bool:
        """Whether experts or rows are shared out over processes."""
        return self.expert_parallel > 1 or self.sequence_parallel > 1


def saved_layout(folder: Path | str) -> Layout:
    """The layout of a saved learner. Raises CheckpointDamaged where there is none."""
    path = Path(folder) / _LAYOUT
    try:
        return Layout(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error


def model_numbers(folder: Path | str) -> dict[str, Any]:
    """What tells models of different shapes apart: the architecture, and every whole number of the ``config.json`` of a
    Hugging Face folder, ids of special tokens aside. Raises OSError and ValueError where it cannot be read."""
    tree = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    numbers = {"architectures": tree.get("architectures")}
    for section in (tree, tree.get("text_config") or {}):
        numbers |= {key: value for key, value in section.items() if type(value) is int and "token_id" not in key}
    return numbers


def is_readable(saved: Layout, wanted: Layout) -> bool:
    """Whether what was saved under one layout can be read under another as it is: without ZeRO every rank has all."""
    return saved == wanted or (
        saved.zero_stage == wanted.zero_stage == 0
        and saved.tensor_parallel == wanted.tensor_parallel
        and not (saved.shares_out or wanted.shares_out)
    )


def check_readable(folder: Path | str, layout: Layout) -> None:
    """Raises ConfigError where the learner in ``folder`` is of another layout and was not converted."""
    saved = saved_layout(folder)
    if not (is_readable(saved, layout) or is_universal(folder)):
        raise ConfigError("the layout of the learner", str(layout), str(saved), "Convert it first: train/resume.")


def is_universal(folder: Path | str) -> bool:
    """Whether the learner in ``folder`` was converted into the form that every layout reads."""
    return (Path(folder) / UNIVERSAL_TAG).is_dir()


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """How the writing of a rank's part ended.

    Attributes:
        seconds: that it took.
        failure: what went wrong; empty where nothing did.
    """

    seconds: float
    failure: str


def take_state(
    engine: Any,
    folder: Path | str,
    *,
    memory: HostMemory,
    rank: int,
    layout: Layout,
    device: str,
    own: Mapping[str, Any],
    base: Mapping[str, str] | None = None,
) -> Snapshot:
    """Copy the state of this rank, to be written into ``folder``, which all ranks see. A collective; no file is
    touched.

    Args:
        engine: DeepSpeed's.
        memory: of this engine; what was copied into it before is overwritten.
        own: plain values and tensors of this rank, which ``load_state`` gives back.
        base: fingerprints of the files that hold what is frozen, which is left out here; None: nothing is left out.
    """
    from rlsys.train.snapshot import CheckpointTaker, Snapshot
    from rlsys.train.universal import optimized_names

    snapshot, left_out = Snapshot(), base is not None
    if rank == 0:
        snapshot.texts[Path(folder) / _LAYOUT] = json.dumps(asdict(layout)) + "\n"
        snapshot.texts[Path(folder) / MODEL_FILE] = json.dumps(model_numbers(engine.module.config.name_or_path))
        if base is not None:
            snapshot.texts[Path(folder) / BASE_FILE] = base_text(base)
    memory.rewind()
    taker = CheckpointTaker(engine.checkpoint_engine, memory, snapshot)
    of_rank: dict[str, Any] = {"generators": _generators(device), "own": dict(own)}
    if layout.zero_stage == 0:
        of_rank["optimized"] = optimized_names(engine)  # DeepSpeed saves their moments by number
    taker.save(of_rank, str(rank_path(Path(folder), rank)))
    wrapped, engine.checkpoint_engine = engine.checkpoint_engine, taker
    engine._copy_recovery_script = _copy_nothing
    try:
        engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False, exclude_frozen_parameters=left_out)
    finally:
        engine.checkpoint_engine = wrapped
    return snapshot


def load_state(engine: Any, folder: Path | str, *, rank: int, layout: Layout, device: str) -> Mapping[str, Any]:
    """Take up the state of ``take_state`` that was written, into a new engine. A collective.

    A process that there was not yet has the random generators of one that there was.

    Args:
        layout: of the engine; another one than that of ``folder`` where that ``is_universal`` or ``is_readable``.

    Returns:
        What ``take_state`` was given as ``own`` there.

    Raises:
        CheckpointDamaged: there are no files of DeepSpeed's.
    """
    import torch

    from rlsys.train.universal import load_universal

    if is_universal(folder):
        load_universal(engine, folder, layout.zero_stage)
    elif engine.load_checkpoint(str(folder), tag=DEEPSPEED_TAG)[0] is None:
        raise CheckpointDamaged(f"{folder} holds no learner: DeepSpeed finds none of its files in {DEEPSPEED_TAG}/")
    saved = saved_layout(folder)
    before = rank_before(rank, layout, saved)
    of_rank = torch.load(rank_path(Path(folder), before), weights_only=True)
    torch.set_rng_state(of_rank["generators"]["cpu"])
    if device == "cuda":
        torch.cuda.set_rng_state(of_rank["generators"]["cuda"])
    own: dict[str, Any] = of_rank["own"]
    if is_universal(folder) and "reference" in own and saved.zero_stage == 3:
        own["reference"] = _joined_reference(Path(folder), saved, before % saved.tensor_parallel)
    return own


def rank_before(rank: int, layout: Layout, saved: Layout) -> int:
    """The process of the saved learner whose place this one takes: the same one where there was one.

    Example:
        >>> rank_before(3, Layout(ranks=2, zero_stage=1, tensor_parallel=2), Layout(ranks=2, zero_stage=1))
        1
    """
    data_rank, part = divmod(rank, layout.processes_a_rank)
    return data_rank % saved.ranks * saved.processes_a_rank + part % saved.processes_a_rank


def _joined_reference(folder: Path, saved: Layout, part: int) -> list[Tensor]:
    """The shards of all data-parallel ranks put together, flat, with the padding of the last one."""
    import torch

    paths = [rank_path(folder, data_rank * saved.tensor_parallel + part) for data_rank in range(saved.ranks)]
    shards = [torch.load(path, weights_only=True)["own"]["reference"] for path in paths]
    return [torch.cat([shard.flatten() for shard in of_parameter]) for of_parameter in zip(*shards, strict=True)]


def _copy_nothing(folder: str) -> None:
    """In place of DeepSpeed's copying of two of its own scripts into every checkpoint."""


def _generators(device: str) -> dict[str, Any]:
    import torch

    generators = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state()
    return generators


def rank_path(folder: Path, rank: int) -> Path:
    """What is a process's own."""
    return folder / f"rank_{rank}.pt"
