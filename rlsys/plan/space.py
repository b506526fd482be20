"""Whether the weights fit into shared memory, and the checkpoints onto the disk."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlsys.actors.algorithm import needs_of
from rlsys.algo.rows import Need
from rlsys.config.load import TINY
from rlsys.config.schema import Config, TrainSection
from rlsys.errors import ConfigError
from rlsys.models.tiny.model import make_random_model, make_tokenizer
from rlsys.plan.skeleton import count_trained
from rlsys.weights.pool import NUM_SEGMENTS
from rlsys.weights.segment import GROWTH_BYTES, SHM_FOLDER, stale_segments

SAFETENSORS_INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header
MOMENTS_BYTES = 8  # a parameter of Adam: two float32; no other optimizer of DeepSpeed's keeps more
EXPORTED_BYTES = 4  # a parameter of the exported model
REFERENCE_BYTES = 4  # a parameter of a reference that moves


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What a run takes, and what is there.

    Attributes:
        num_parameters: of the model.
        shm_bytes: shared memory that its weights take.
        free_shm_bytes: None where a cluster decides which machine holds the run.
        checkpoint_bytes: of one checkpoint, with those of the models around the policy.
        disk_bytes: what its checkpoints and the exported model take at most.
        free_disk_bytes: on the file system of ``run.root``, what the run itself holds there by now included.
    """

    num_parameters: int
    shm_bytes: int
    free_shm_bytes: int | None
    checkpoint_bytes: int
    disk_bytes: int
    free_disk_bytes: int


def check_space(config: Config, *, adapters_alone: bool = False) -> Space:
    """Compare what the run takes with what there is. Looks at the model's files, writes nothing.

    Args:
        adapters_alone: whether that is what engines get.

    Raises:
        ConfigError: not enough shared memory or disk, a broken weight file, or no folder can be made at ``run.root``.
    """
    num_parameters = count_parameters(config.model.path)
    num_published = count_trained(config, num_parameters) if adapters_alone else num_parameters
    checkpoint = _checkpoint_bytes(config, num_parameters)
    space = Space(
        num_parameters=num_parameters,
        shm_bytes=NUM_SEGMENTS * segment_bytes(num_published, config.model.dtype),
        free_shm_bytes=None if is_cluster_named(config) else _free_shm(),
        checkpoint_bytes=checkpoint,
        disk_bytes=(config.checkpoint.keep + 1) * checkpoint + EXPORTED_BYTES * num_parameters,
        free_disk_bytes=_free_disk(config),
    )
    _check_shm(config, space)
    _check_disk(config, space)
    return space


def is_cluster_named(config: Config) -> bool:
    """Whether the run joins a cluster, so that it need not take place on this machine."""
    return bool(config.ray.address or os.environ.get("RAY_ADDRESS"))


def count_parameters(model_path: str) -> int:
    """Parameters of the model in a folder, or of the embedded one, without loading it.

    Weights in PyTorch's own format have no header; they are counted by the size of their files.

    Raises:
        ConfigError: a weight file is missing, cut short or otherwise broken.
    """
    if model_path == TINY:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in make_random_model(make_tokenizer()).parameters())
    folder = Path(model_path)
    if files := _safetensors_files(folder):
        return sum(_count_in(file) for file in files)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_half = (config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16")
    return sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin")) // (2 if is_half else 4)


def segment_bytes(num_parameters: int, dtype: str) -> int:
    """Shared memory of one version of the weights in the engines' precision; segments grow in whole steps."""
    return -(-num_parameters * getattr(torch, dtype).itemsize // GROWTH_BYTES) * GROWTH_BYTES


def _checkpoint_bytes(config: Config, num_parameters: int) -> int:
    total = checkpoint_bytes(count_trained(config, num_parameters), config.train)
    if Need.CRITIC in needs_of(config):
        path = config.critic.path
        total += checkpoint_bytes(num_parameters if path is None else count_parameters(path), config.train)
    if config.algo.kl is not None and config.algo.reference_every_steps:
        shares = 1 if config.train.zero_stage == 3 else config.train.ranks  # every rank keeps what it holds
        total += REFERENCE_BYTES * num_parameters * shares
    return total


def checkpoint_bytes(num_parameters: int, train: TrainSection) -> int:
    """What DeepSpeed writes of the parameters that are trained: the weights (a ZeRO-3 model has none beside the
    optimizer's), the optimizer's own float32 copy of them (unless the weights are float32 and whole), and the
    moments."""
    is_bf16 = train.dtype == "bfloat16"
    weights = 0 if train.zero_stage == 3 else 2 if is_bf16 else 4
    copy = 4 if is_bf16 or train.zero_stage > 0 else 0
    return (weights + copy + MOMENTS_BYTES) * num_parameters


def in_units(num_bytes: int) -> str:
    """``3.21 GiB``, or ``12.0 MiB`` below a tenth of a GiB."""
    gib = num_bytes / 2**30
    return f"{gib:,.2f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:.1f} MiB"


def _check_shm(config: Config, space: Space) -> None:
    if space.free_shm_bytes is None or space.shm_bytes <= space.free_shm_bytes:
        return
    size = f"{space.num_parameters:,} parameters in {config.model.dtype}"
    smaller = "" if config.model.dtype == "bfloat16" else ", set model.dtype=bfloat16 (half of it)"
    raise ConfigError(
        f"shared memory ({SHM_FOLDER})",
        got=f"{in_units(space.free_shm_bytes)} free",
        wanted=f"{in_units(space.shm_bytes)}: {NUM_SEGMENTS} weight versions of {size}",
        remedy=f"enlarge it (mount -o remount,size=... {SHM_FOLDER}; a container's --shm-size), remove what nobody "
        f"needs there{smaller}, or choose a smaller model",
    )


def _check_disk(config: Config, space: Space) -> None:
    if space.disk_bytes <= space.free_disk_bytes:
        return
    number, one = config.checkpoint.keep + 1, in_units(space.checkpoint_bytes)
    model = in_units(EXPORTED_BYTES * space.num_parameters)
    raise ConfigError(
        f"run.root={config.run.root}",
        got=f"{in_units(space.free_disk_bytes)} free on its disk",
        wanted=f"{in_units(space.disk_bytes)}: {number} checkpoints (checkpoint.keep + 1) of {one}, and {model} for "
        f"the exported model ({space.num_parameters:,} parameters)",
        remedy="make room there, lower checkpoint.keep, or set run.root to a folder on another disk",
    )


def _free_shm() -> int:
    """Free bytes of shared memory, with what dead runs left there: the learner removes it when it starts."""
    return shutil.disk_usage(SHM_FOLDER).free + sum(path.stat().st_size for path in stale_segments())


def _free_disk(config: Config) -> int:
    """Free bytes where the run folder is or will be. What an earlier part of this run keeps there is replaced, so that
    it counts as free."""
    folder = config.run.root / config.run.name
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.root={config.run.root}",
            got=f"{there} is {'a folder that cannot be written to' if there.is_dir() else 'a file'}",
            wanted="a folder, or a place where one can be made",
            remedy="set run.root to a folder of yours",
        )
    own = [folder / "checkpoints", folder / "model"]
    held = sum(file.stat().st_size for path in own for file in path.rglob("*") if file.is_file())
    return shutil.disk_usage(there).free + held


def _safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a model: those that an index lists, else the one of the usual name, else all there are."""
    if (folder / SAFETENSORS_INDEX).is_file():
        weight_map = _json_of(folder / SAFETENSORS_INDEX, "weight_map")
        return sorted({folder / str(name) for name in weight_map.values()})
    usual = folder / "model.safetensors"
    return [usual] if usual.is_file() else sorted(folder.glob("*.safetensors"))


def _count_in(file: Path) -> int:
    """Elements of all tensors in a safetensors file, from its header."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            size_bytes = os.fstat(opened.fileno()).st_size
            header = json.loads(opened.read(length)) if 0 < length <= size_bytes - LENGTH_BYTES else None
        tensors = [entry for name, entry in dict(header or {}).items() if name != "__metadata__"]
        data_bytes = max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
        count = sum(math.prod(tensor["shape"]) for tensor in tensors)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _broken(file, f"{type(error).__name__}: {error}") from error
    if header is None or LENGTH_BYTES + length + data_bytes > size_bytes:
        raise _broken(file, f"a file of {size_bytes:,} bytes that is cut short")
    return count


def _json_of(file: Path, key: str) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))[key]
        return dict(tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(file, f"{type(error).__name__}: {error}") from error


def _broken(file: Path, got: str) -> ConfigError:
    return ConfigError(
        "model.path",
        got=f"{file}: {got}",
        wanted="whole safetensors files, all that the index lists",
        remedy="download the model's weights again, or write them with save_pretrained",
    )
