"""A published version sent into one engine by one of vLLM's own backends, with this process as vLLM's "trainer".

The real trainer, the learner, has no part in it: what is sent is a segment, which stays as it is while it is read. Each
engine has a sender and a transfer group of its own, so that engines take over versions at their own pace here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rlsys.records import TensorEntry, Version, WeightVersion
from rlsys.weights.readers import SegmentReaders
from rlsys.weights.segment import SegmentReader
from rlsys.weights.tcp import free_port


def _nccl(host: str, workers: int) -> TrainerInitInfo:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(rank=0, master_address=host, master_port=free_port(), world_size=1 + workers)


def _ipc(host: str, workers: int) -> TrainerInitInfo:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    # packed: through one buffer, instead of a second copy of the weights on the engine's GPU
    return IPCTrainerInitInfo(rank=0, packed=True)


# What opens the trainer's side of each backend, given this machine's address and the number of the engine's workers.
INIT_INFOS: dict[str, Callable[[str, int], TrainerInitInfo]] = {"nccl": _nccl, "ipc": _ipc}


class SegmentSource(WeightSource):
    """The version that was shown last: its manifest, and its tensors, each brought to ``device`` in its turn."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._entries: Sequence[TensorEntry] = ()
        self._reader: SegmentReader | None = None

    def show(self, reader: SegmentReader, entries: Sequence[TensorEntry]) -> None:
        self._reader, self._entries = reader, entries

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(entry.name, getattr(torch, entry.dtype), entry.shape) for entry in self._entries]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._reader is not None, "no version was shown"
        for name, tensor in self._reader.tensors():
            yield name, tensor.to(self._device)


class Sender:
    """Sends versions to one engine. Every method blocks, for as long as the engine does: deadlines are the caller's.

    Args:
        backend: a key of ``INIT_INFOS``.
        client: by which the engine is called.
        host: address of this machine, for the engine's workers.
        workers: processes that the engine computes in.
        device: where the backend takes tensors from.
    """

    def __init__(self, backend: str, client: VLLMWeightSyncClient, *, host: str, workers: int, device: str) -> None:
        self._backend, self._client, self._host, self._workers = backend, client, host, workers
        self._readers = SegmentReaders()
        self._source = SegmentSource(device)
        self._trainer: TrainerWeightTransferEngine[Any] | None = None
        self._prepared: Version | None = None

    def prepare(self, weights: WeightVersion) -> None:
        """Compare the bytes with their checksums, and meet the engine's workers where that has not happened yet.

        Raises:
            WeightsRefused: the bytes are others, or the segment is gone.
        """
        self._prepared = None
        reader = self._readers.open(weights.segment, weights.tensors)
        reader.verify()
        self._source.show(reader, weights.tensors)
        if self._trainer is None:
            info = INIT_INFOS[self._backend](self._host, self._workers)
            self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)
        self._prepared = weights.version

    def send(self, weights: WeightVersion) -> None:
        """Into the workers of the engine, which must be paused. The version was prepared last."""
        assert self._trainer is not None and self._prepared == weights.version, f"{weights.version} was not prepared"
        self._trainer.send_weights()


def client_of(actor: Any) -> VLLMWeightSyncClient:
    """Calls an engine by the Ray actor that drives it, and that has vLLM's methods for it."""
    return RayVLLMWeightSyncClient(actor)
