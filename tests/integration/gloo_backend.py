"""A backend of weight transfers for machines without a GPU, of the same build as vLLM's ``nccl``: a broadcast, in which
the sender and the engine's workers meet. It stands in for that in tests; all around it is the real way.

The import registers both sides, in the worker and in the sender's process.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from typing import Any, ClassVar, Self

import torch
from torch.distributed import BroadcastOptions, ProcessGroup
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlsys.actors import sender
from rlsys.actors.rollout import RolloutActor
from rlsys.weights import vllm_plugin
from rlsys.weights.tcp import free_port
from rlsys.weights.vllm_sender import INIT_INFOS

BACKEND = "test_gloo"
FAULT = Path("/dev/shm/rlsys-test-gloo-fault")  # holds what goes wrong in the next transfer, after its first tensor
DIE, HANG = "die", "hang"


@dataclass
class Rendezvous(WeightTransferInitInfo):
    host: str
    port: int
    world_size: int


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = BACKEND
    at: Rendezvous


@dataclass
class Tensors(WeightTransferUpdateInfo):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


def _join(at: Rendezvous, rank: int) -> ProcessGroup:
    group = stateless_init_torch_distributed_process_group(at.host, at.port, rank, at.world_size, backend="gloo")
    assert isinstance(group, ProcessGroup)
    return group


def _broadcast(group: ProcessGroup, tensor: torch.Tensor) -> None:
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


class GlooEngine(WeightTransferEngine[Rendezvous, Tensors]):
    """The worker's side."""

    init_info_cls, update_info_cls = Rendezvous, Tensors
    _group: ProcessGroup

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        self._group = _join(init_info, 1 + self.parallel_config.rank)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Tensors) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            _broadcast(self._group, tensor)
            self.model.load_weights([(name, tensor)])  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        vllm_plugin.repack_tied_embeddings(self.model)  # needed on CPU only

    def shutdown(self) -> None:
        """The group goes with the process."""


class GlooTrainer(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The sender's side."""

    init_info_cls = GlooTrainerInitInfo
    _group: ProcessGroup

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        trainer = cls(client=client, source=source)
        with ThreadPoolExecutor(1) as beside:
            joined = beside.submit(client.init_weight_transfer_engine, asdict(init_info.at))
            trainer._group = _join(init_info.at, 0)
            joined.result()
        return trainer

    def send_weights(self) -> None:
        assert self.source is not None
        meta = self.source.metadata()
        update = Tensors(
            names=[one.name for one in meta],
            dtypes=[str(one.dtype).removeprefix("torch.") for one in meta],
            shapes=[list(one.shape) for one in meta],
        )
        self.client.start_weight_update()
        beside = ThreadPoolExecutor(1)
        received = beside.submit(self.client.update_weights, asdict(update))
        beside.shutdown(wait=False)
        for _, tensor in self.source:
            _broadcast(self._group, tensor)
            _fail_if_wanted()
        received.result()
        self.client.finish_weight_update()


def _fail_if_wanted() -> None:
    if FAULT.exists() and FAULT.read_text() == DIE:
        raise RuntimeError("the sender broke down")
    while FAULT.exists():
        sleep(0.05)


class WorkerExtension(vllm_plugin.WorkerExtension):
    """Names this module to vLLM."""


def _init_info(host: str, workers: int) -> Any:
    return GlooTrainerInitInfo(rank=0, at=Rendezvous(host=host, port=free_port(), world_size=1 + workers))


class GlooSenderActor(sender.SenderActor):
    """Names this module to the process of a sender."""


class GlooRolloutActor(RolloutActor):
    """Names this module to the process of an engine, and tells of its sender."""

    async def pid_of_sender(self) -> int:
        assert self._sender is not None
        pid: int = await self._sender._actor.__ray_call__.remote(lambda _: os.getpid())
        return pid


WeightTransferEngineFactory.register_engine(BACKEND, GlooEngine)
WeightTransferTrainerFactory.register_engine(BACKEND, GlooTrainer)
INIT_INFOS[BACKEND] = _init_info
sender.SenderActor = GlooSenderActor  # type: ignore[misc]
