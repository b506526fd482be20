"""Whether optimizer, schedule, precision and offload of a config exist, fit one another, and run on the device."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes.util import find_library
from typing import Any

from rlsys.config.schema import Config, TrainSection
from rlsys.errors import ConfigError
from rlsys.plan.algorithm import check_row
from rlsys.plan.space import is_cluster_named
from rlsys.train.compiled_ops import check_can_compile
from rlsys.train.deepspeed_config import deepspeed_config
from rlsys.train.optimizers import GONE, OPTIMIZERS, chosen, is_offloaded
from rlsys.train.schedule import SCHEDULES

_QUANTISED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


def check_training(config: Config) -> None:
    """Raises ConfigError for the first thing found that cannot work, or acts on nothing."""
    train = config.train
    device = "cuda" if train.gpus_per_rank > 0 else "cpu"
    check_row("train.schedule", train.schedule, SCHEDULES)
    check_optimizer(train, device)
    check_offload(train)
    check_disk(train.deepspeed)
    if is_offloaded(train) and chosen(train).op is not None and not is_cluster_named(config):
        check_can_compile(f"train.offload={train.offload}")
    check_precision(train)
    check_quantised(train.deepspeed, device)
    deepspeed_config(train, device=device)


def check_optimizer(train: TrainSection, device: str) -> None:
    name = train.optimizer.name
    if name.lower().replace("-", "_") in GONE:
        raise ConfigError(
            "train.optimizer.name",
            got=repr(name),
            wanted="one of " + ", ".join(OPTIMIZERS),
            remedy=f"choose one of these: {GONE[name.lower().replace('-', '_')]}",
        )
    check_row("train.optimizer", train.optimizer, OPTIMIZERS)
    optimizer = chosen(train)
    if not optimizer.has_betas and train.betas != TrainSection().betas:
        raise ConfigError(
            "train.betas",
            got=f"{list(train.betas)}, which act on nothing: {name} has no two moments",
            wanted="no value",
            remedy="leave it out, or choose another optimizer",
        )
    if device == "cpu" and train.offload == "none" and not optimizer.on_cpu:
        able = ", ".join(other for other, row in OPTIMIZERS.items() if row().on_cpu)
        raise ConfigError(
            "train.optimizer.name",
            got=f"{name!r} on CPU ranks",
            wanted=f"an optimizer that runs there: {able}",
            remedy="choose one of these; or set train.offload=optimizer and train.zero_stage=1 or above, by which it "
            "runs as a compiled op",
        )

    if name == "muon":
        check_muon(train)


def check_muon(train: TrainSection) -> None:
    """Where DeepSpeed's Muon would be another optimizer in another layout (tried out: 20 steps at every ZeRO stage)."""
    if train.max_grad_norm > 0.0:
        raise ConfigError(
            f"train.max_grad_norm={train.max_grad_norm:g}",
            got="muon beside it, whose updates DeepSpeed would clip under ZeRO instead of gradients",
            wanted="0: the size of a gradient says nothing about that of a muon update",
            remedy="set train.max_grad_norm=0, or choose another optimizer",
        )
    if train.tensor_parallel > 1:
        raise ConfigError(
            f"train.tensor_parallel={train.tensor_parallel}",
            got="muon beside it, which would make each piece of a matrix orthogonal by itself",
            wanted="whole matrices",
            remedy="set train.tensor_parallel=1, or choose another optimizer",
        )


def check_offload(train: TrainSection) -> None:
    needed = {"none": (0, 1, 2, 3), "optimizer": (1, 2, 3), "optimizer+params": (3,)}[train.offload]
    if train.zero_stage not in needed:
        stages = "stage 3" if needed == (3,) else "stage 1, 2 or 3"
        raise ConfigError(
            f"train.offload={train.offload}",
            got=f"ZeRO stage {train.zero_stage}",
            wanted=f"ZeRO {stages}: only what ZeRO divides can be offloaded",
            remedy=f"set train.zero_stage={max(2, needed[0])}, or train.offload=none",
        )


def check_disk(passed: Mapping[str, Any]) -> None:
    """ZeRO-Infinity reads and writes by libaio, which DeepSpeed compiles against."""
    zero = _section(passed, "zero_optimization")
    for part in ("offload_optimizer", "offload_param"):
        device = _section(zero, part).get("device")
        if device == "cpu":
            raise ConfigError(
                f"train.deepspeed.zero_optimization.{part}.device",
                got="'cpu'",
                wanted="nvme, or no entry",
                remedy="set train.offload instead",
            )
        if device == "nvme" and find_library("aio") is None:
            raise ConfigError(
                f"train.deepspeed.zero_optimization.{part}.device",
                got="'nvme' on a machine without libaio",
                wanted="libaio and its headers, by which DeepSpeed reads and writes disks",
                remedy="install libaio-dev (Debian) or libaio-devel (Red Hat), or set train.offload instead",
            )


def check_precision(train: TrainSection) -> None:
    if train.float32_head and train.dtype == "float32" and "torch_autocast" not in train.deepspeed:
        raise ConfigError(
            "train.float32_head",
            got="true with train.dtype=float32, where the whole model is computed in float32",
            wanted="train.dtype=bfloat16 beside it",
            remedy="leave it out, or set train.dtype=bfloat16",
        )


def check_quantised(passed: Mapping[str, Any], device: str) -> None:
    """DeepSpeed's kernels that quantise what ZeRO++ sends are written for GPUs."""
    zero = _section(passed, "zero_optimization")
    for key in _QUANTISED if device == "cpu" else ():
        if zero.get(key):
            raise ConfigError(
                f"train.deepspeed.zero_optimization.{key}",
                got=f"{zero[key]!r} on CPU ranks",
                wanted="GPUs: DeepSpeed has no such kernel for the CPU",
                remedy="leave it out, or set train.gpus_per_rank",
            )


def _section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What stands below a key; nothing where it is no section."""
    below = tree.get(key)
    return below if isinstance(below, Mapping) else {}
