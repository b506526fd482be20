"""How a weight version comes to the machine of an engine: one Protocol, and what ``rollout.weight_channel`` may say.

A version is a segment in shared memory on the learner's machine, with its manifest. By ``shm`` the engines of that
machine read it as it lies there; by ``tcp`` a mirror brings it to a machine, once for all engines there. So the learner
trains on while engines take over a version at their own pace, each byte against its checksum. On the engine's side both
are one backend of vLLM's factory of weight transfers (``vllm_plugin``).

vLLM's own backends stand beside it. Their sender is not the learner, which would have to wait, but a process for each
engine that reads the version where it lies (``vllm_sender``): with ``nccl`` on the learner's machine and GPU; with
``ipc`` on the engine's, where the version comes first as by ``auto``.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from rlsys.errors import ConfigError
from rlsys.records import WeightVersion

AUTO, SHM, TCP = "auto", "shm", "tcp"
NCCL, IPC, SHARDED_RDT = "nccl", "ipc", "sharded_rdt"
# vLLM's own, without checksums: the sender compares the bytes that it reads, and the probe proves what arrived.
NATIVE = (NCCL, IPC)


class Channel(Protocol):
    """To the engines of one machine. Contract:

    * within ``holding`` the version lies in a segment on that machine, with the bytes of its manifest, and these are
      not overwritten, whoever else holds which version meanwhile (provided that the learner's segment is not either).
    * a version that cannot be brought raises WeightsRefused, and others can be brought afterwards; or EngineLost.
    """

    @property
    def is_lost(self) -> bool:
        """Whether it is of no more use."""
        ...

    def holding(self, weights: WeightVersion) -> AbstractAsyncContextManager[WeightVersion]: ...

    def close(self) -> None: ...


class SharedMemory:
    """To engines on the learner's machine: there is nothing to bring."""

    is_lost = False

    def holding(self, weights: WeightVersion) -> AbstractAsyncContextManager[WeightVersion]:
        return nullcontext(weights)

    def close(self) -> None:
        """The segments are the learner's."""


def channel_name(wanted: str, *, is_home: bool) -> str:
    """The channel to a machine.

    Args:
        wanted: ``rollout.weight_channel``.
        is_home: whether it is the learner's machine.

    Example:
        >>> channel_name("auto", is_home=True), channel_name("auto", is_home=False), channel_name("tcp", is_home=True)
        ('shm', 'tcp', 'tcp')
        >>> channel_name("nccl", is_home=False), channel_name("ipc", is_home=False)
        ('shm', 'tcp')
    """
    if wanted == NCCL:
        return SHM  # the sender is on the learner's machine, wherever the engine is
    return wanted if wanted in (SHM, TCP) else SHM if is_home else TCP


def check_channel(wanted: str, *, gpus_per_replica: float, gpus_per_rank: float, workers: int) -> None:
    """Raises ConfigError where a channel of vLLM's own cannot work.

    Args:
        wanted: ``rollout.weight_channel``.
        workers: processes of one engine.
    """
    got, remedy = "", "leave it at auto, by which engines on GPUs load, too"
    if wanted == SHARDED_RDT:
        got = "it takes engines whose workers are actors of Ray; here they are processes of the engine"
    elif wanted in NATIVE and gpus_per_replica == 0:
        got, remedy = "it takes engines on GPUs, with rollout.gpus_per_replica=0", "leave it at auto"
    elif wanted == NCCL and gpus_per_rank == 0:
        got = "it sends from the learner's GPU, with train.gpus_per_rank=0"
    elif wanted == NCCL and gpus_per_replica < 1:
        got = f"it takes one process on each GPU, with rollout.gpus_per_replica={gpus_per_replica:g} others share it"
    elif wanted == IPC and workers > 1:
        got = f"it shares the memory of one GPU, with {workers} processes of one engine, each on a GPU of its own"
        remedy = "set it to nccl, or leave it at auto"
    if got:
        raise ConfigError(
            "rollout.weight_channel", got=f"{wanted}: {got}", wanted="a channel that reaches the engines", remedy=remedy
        )


def check_reach(wanted: str, num_elsewhere: int) -> None:
    """Raises ConfigError where ``shm`` is to serve engines on other machines than the learner's."""
    if wanted == SHM and num_elsewhere:
        raise ConfigError(
            "rollout.weight_channel",
            got=f"shm, with {num_elsewhere} engines on other machines than the learner",
            wanted="every engine on the learner's machine",
            remedy="set it to auto, or lower rollout.replicas to what that machine holds",
        )
