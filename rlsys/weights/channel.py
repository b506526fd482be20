"""How a weight version comes to the machine of an engine: one Protocol, and what ``rollout.weight_channel`` may say.

A version is a segment in shared memory on the learner's machine, with its manifest. By ``shm`` the engines of that
machine read it as it lies there; by ``tcp`` a mirror brings it to a machine, once for all engines there. So the learner
trains on while engines take over a version at their own pace, each byte against its checksum. On the engine's side both
are one backend of vLLM's factory of weight transfers (``vllm_plugin``), where vLLM's own ones stand beside it.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from rlsys.errors import ConfigError
from rlsys.records import WeightVersion

AUTO, SHM, TCP = "auto", "shm", "tcp"

# vLLM's own backends, as its sources describe the trainer's side (vllm/distributed/weight_transfer). No checksums: only
# the probe would prove what they brought.
NATIVE = {
    "nccl": "a broadcast of the learner's live weights, in which learner and engines wait for one another",
    "ipc": "handles to the learner's live weights, for engines on the learner's own GPUs",
    "sharded_rdt": "engines that read the learner's live weights over RDMA while it gathers them",
}


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
    """
    return wanted if wanted != AUTO else SHM if is_home else TCP


def check_channel(wanted: str, *, gpus_per_replica: float) -> None:
    """Raises ConfigError for vLLM's own channels: the learner would have to stand still until every engine has the
    version, and here it trains on."""
    if wanted not in NATIVE:
        return
    got, remedy = f"{wanted}: {NATIVE[wanted]}", "leave it at auto; engines on GPUs load from shared memory, too"
    if gpus_per_replica == 0:
        got, remedy = f"{wanted}, which takes GPUs, with rollout.gpus_per_replica=0", "leave it at auto"
    raise ConfigError(
        "rollout.weight_channel",
        got=got,
        wanted="auto, shm or tcp, by which the learner trains on while engines take over a version",
        remedy=remedy,
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
