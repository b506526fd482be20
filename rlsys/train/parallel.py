"""Everything in which learner ranks talk to one another. DeepSpeed's own collectives aside, the only ones are here.

Every function is a collective: all ranks call it in the same order, or all of them wait until the deadline.

Under tensor and sequence parallel, N processes in a row share one data-parallel rank: its microbatches, and its model
or their rows. Sums are over the data-parallel ranks, so that what N processes hold alike counts once; flags are over
all processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.algo.measures import Measure

_data_group: Any = None  # processes with the same part of the model; None: all. Set by join, like torch's own groups


def load_deepspeed(device: str) -> ModuleType:
    """DeepSpeed, imported for ``device`` (``cpu`` or ``cuda``). No collective.

    Its accelerator is chosen once per process, from the environment, when it is imported. Its shared-memory op serves
    inference only, but building it holds up the first start for minutes, and a build that was killed leaves a lock
    that holds up every later one for ever: it is switched off. On CPU so is torch.compile, which DeepSpeed puts on
    Muon: compiling takes longer than it saves.
    """
    os.environ["DS_ACCELERATOR"] = device
    if device == "cpu":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls torch by names that torch has renamed: a line of warning at every collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return deepspeed


def join(
    deepspeed: ModuleType,
    *,
    device: str,
    rank: int,
    world_size: int,
    master_addr: str,
    master_port: int,
    timeout_s: float,
    processes_a_rank: int = 1,
) -> None:
    """Meet the other ranks at ``master_addr:master_port``. Raises torch's DistStoreError where they do not come.

    Args:
        rank, world_size: of all processes.
        processes_a_rank: so many in a row share a data-parallel rank; divides ``world_size``.
    """
    global _data_group
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",  # each rank is shown its own device only
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
    )
    if master_addr in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    deepspeed.init_distributed(
        "nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    if processes_a_rank > 1:
        alike = [list(range(part, world_size, processes_a_rank)) for part in range(processes_a_rank)]
        _data_group, _ = dist.new_subgroups_by_enumeration(alike, timeout=timedelta(seconds=timeout_s))


def leave(deepspeed: ModuleType) -> None:
    """Part from the other ranks; ``join`` may follow, with a new port."""
    global _data_group
    _data_group = None
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()


def on_any_rank(flag: bool, device: str) -> bool:
    """Whether ``flag`` is set in at least one process."""
    flags = torch.tensor([float(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def total(numbers: Tensor, device: str) -> Tensor:
    """The sum over all data-parallel ranks, of a tensor that has the same shape on each."""
    return _summed(numbers, device, _data_group)


def total_of_processes(numbers: Tensor, device: str) -> Tensor:
    """The sum over all processes, of what each has of its own."""
    return _summed(numbers, device, None)


def _summed(numbers: Tensor, device: str, group: Any) -> Tensor:
    result = numbers.detach().to(device, copy=True)
    dist.all_reduce(result, op=dist.ReduceOp.SUM, group=group)
    return result.to(numbers.device)


def joined(own: Tensor, group: Any, dim: int) -> Tensor:
    """The pieces of all processes of ``group``, alike in shape, one after another along ``dim``."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def gathered(numbers: Tensor) -> Tensor:
    """The numbers of all data-parallel ranks one after another, of 1-D tensors that may differ in length."""
    parts: list[Any] = [None] * dist.get_world_size(_data_group)
    dist.all_gather_object(parts, numbers.detach().cpu(), group=_data_group)
    return torch.cat(parts).to(numbers.device)


def reduce(measures: Mapping[str, Measure], device: str) -> dict[str, float]:
    """The metrics over all data-parallel ranks; one that nothing was measured for is left out. Every rank has the same
    names."""
    result: dict[str, float] = {}
    for combine, operation in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
        chosen = {name: measure for name, measure in sorted(measures.items()) if measure.combine == combine}
        if not chosen:
            continue
        numbers = torch.cat([measure.numbers for measure in chosen.values()]).to(device)
        dist.all_reduce(numbers, op=operation, group=_data_group)
        sizes = [measure.numbers.numel() for measure in chosen.values()]
        for (name, measure), own in zip(chosen.items(), numbers.split(sizes), strict=True):
            value = type(measure)(own).value()
            if value is not None:
                result[name] = value
    return result
