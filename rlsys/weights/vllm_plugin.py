"""How a vLLM worker takes over a weight version from a shared-memory segment.

vLLM's worker process imports this module because ``worker_extension_cls`` names a class in it; the import registers the
transfer engine with vLLM's factory, whose registry is one per process, and lets the worker end with the process that
drives the engine: where that is killed, the worker would be left behind, at work for nobody.

The bytes were verified by the process that drives the engine, before the pause; here they are only loaded. Where the
model allows it, that happens before the pause too (``vllm_prepared``).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tqdm import tqdm
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlsys.records import TensorEntry
from rlsys.weights.owner import end_with_named_owner
from rlsys.weights.readers import SegmentReaders
from rlsys.weights.vllm_adapter import AdapterSlot
from rlsys.weights.vllm_prepared import PreparedWeights, can_prepare

BACKEND = "rlsys_shm"
_READERS = SegmentReaders()  # of this worker process


class WorkerExtension:
    """Names this module to vLLM, and adds to its worker what can be called while requests run."""

    weight_transfer_engine: ShmWeightTransferEngine  # with another backend nothing of this is called

    def prepare_weights(self, update_info: dict[str, Any]) -> bool:
        engine = self.weight_transfer_engine
        return engine.prepare(engine.parse_update_info(update_info))

    def weight_preparation(self) -> tuple[bool, str | None]:
        return self.weight_transfer_engine.preparation()

    def prepare_adapter(self, update_info: dict[str, Any]) -> str | None:
        engine = self.weight_transfer_engine
        return engine.adapter.prepare(dict(_tensors(engine.parse_update_info(update_info))))

    def exchange_adapter(self) -> None:
        self.weight_transfer_engine.adapter.exchange()


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Where a version lies. Plain values only: vLLM sends them to its workers as message packs.

    Attributes:
        segment: path of the segment.
        names, shapes, dtypes, offsets, num_bytes: one entry per tensor.
    """

    segment: str
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    offsets: list[int]
    num_bytes: list[int]


def update_info(segment: str, tensors: Sequence[TensorEntry]) -> dict[str, Any]:
    """The manifest as ``ShmUpdateInfo`` keywords."""
    return {
        "segment": segment,
        "names": [entry.name for entry in tensors],
        "shapes": [list(entry.shape) for entry in tensors],
        "dtypes": [entry.dtype for entry in tensors],
        "offsets": [entry.offset for entry in tensors],
        "num_bytes": [entry.num_bytes for entry in tensors],
    }


class ShmWeightTransferEngine(WeightTransferEngine[WeightTransferInitInfo, ShmUpdateInfo]):
    """Loads views into the segment through the model's own weight loaders, inside vLLM's layerwise reload: into the
    model itself, or into a twin of it that was prepared beforehand."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = ShmUpdateInfo
    _prepared: PreparedWeights | None = None

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """There is nobody to meet."""

    @cached_property
    def adapter(self) -> AdapterSlot:
        """Of an engine that was started with room for one."""
        return AdapterSlot(self.model)

    def prepare(self, update_info: ShmUpdateInfo) -> bool:
        """Begin to load and pack a version beside the running model, for the update that comes next. False where that
        is not possible with this model: then the update does all of it."""
        self._abandon()
        if not can_prepare(self.model, self.vllm_config):
            return False
        self._prepared = PreparedWeights(self.model, self.vllm_config, _tensors(update_info), self._load)
        return True

    def preparation(self) -> tuple[bool, str | None]:
        """Whether what was begun is over, and why it failed."""
        if self._prepared is None:
            return True, None
        if self._prepared.is_over and self._prepared.failure is not None:
            failure = self._prepared.failure
            self._abandon()
            return True, failure
        return self._prepared.is_over, None

    def start_weight_update(self) -> None:
        if self._prepared is None:
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        if self._prepared is None:
            self.model.load_weights(_tensors(update_info))  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        if self._prepared is None:
            self._finish(self.model)
        else:
            self._prepared.exchange()
            self._prepared = None

    def shutdown(self) -> None:
        self._abandon()

    def _load(self, model: torch.nn.Module, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        initialize_layerwise_reload(model)
        model.load_weights(tensors)  # type: ignore[operator]
        self._finish(model)

    def _finish(self, model: torch.nn.Module) -> None:
        finalize_layerwise_reload(model, self.model_config)
        repack_tied_embeddings(model)
        repack_experts(model)

    def _abandon(self) -> None:
        if self._prepared is not None:
            self._prepared.abandon()
            self._prepared = None


def _tensors(info: ShmUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
    entries = [
        TensorEntry(name=name, shape=tuple(shape), dtype=dtype, offset=offset, num_bytes=num_bytes, checksum=0)
        for name, shape, dtype, offset, num_bytes in zip(
            info.names, info.shapes, info.dtypes, info.offsets, info.num_bytes, strict=True
        )
    ]
    return _READERS.open(info.segment, entries).tensors()


def repack_tied_embeddings(model: torch.nn.Module) -> int:
    """Pack again every embedding that shares its weight with another module; returns how many were packed.

    On CPU vLLM multiplies by a packed copy of the matrix (``cpu_linear``), made once per module. A tied head receives
    no weights of its own in a reload, so without this it would silently keep the packed copy of the old weights.
    """
    sharing: dict[int, list[torch.nn.Module]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            sharing[module.weight.data_ptr()].append(module)
    tied = [module for modules in sharing.values() if len(modules) > 1 for module in modules]
    for module in tied:
        # some quantisation methods pack only once unless this mark is taken away
        module.__dict__.pop("_already_called_process_weights_after_loading", None)
        module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
    return len(tied)


def repack_experts(model: torch.nn.Module) -> None:
    """Pack every layer of experts as the CPU kernel reads it.

    vLLM packs experts only when it first builds their kernel. A reload leaves the plain weights in their place, which
    the kernel would read as if they were packed.
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if isinstance(experts, CPUUnquantizedExperts):
            experts.process_weights_after_loading(module)


# Its own lock is a semaphore in shared memory: made when weights are loaded, left behind where the worker is killed.
tqdm.set_lock(threading.RLock())
WeightTransferEngineFactory.register_engine(BACKEND, ShmWeightTransferEngine)
end_with_named_owner()
