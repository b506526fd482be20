"""How a version gets into an engine's workers: the one step of a weight swap that there are several ways for."""

from __future__ import annotations

import asyncio
from typing import Protocol

from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.v1.engine.async_llm import AsyncLLM

from rlsys.errors import WeightsRefused
from rlsys.records import WeightVersion
from rlsys.rollout.vllm_settings import VllmSettings
from rlsys.weights.readers import SegmentReaders
from rlsys.weights.vllm_plugin import update_info

PREPARATION_POLL_S = 0.02  # between two looks whether the workers are ready


class Delivery(Protocol):
    """Contract: ``prepare``, which runs while the engine generates, compares the bytes with their checksums; where it
    raises WeightsRefused, the engine is as it was. ``deliver`` follows it, within the pause; after it every worker
    computes with the version, and vLLM stamps tokens with it."""

    async def prepare(self, llm: AsyncLLM, weights: WeightVersion) -> None: ...

    async def deliver(self, llm: AsyncLLM, weights: WeightVersion) -> None: ...


class WeightSender(Protocol):
    """A process that sends versions to one engine, by one of vLLM's own backends (``rlsys.weights.vllm_sender``).
    ``prepare`` raises WeightsRefused; every other error means that nothing more comes from it."""

    async def prepare(self, weights: WeightVersion) -> None: ...

    async def send(self, weights: WeightVersion) -> None: ...


def delivery_of(engine: str, settings: VllmSettings, sender: WeightSender | None) -> Delivery:
    """The way into an engine with these settings."""
    if settings.weight_backend is not None:
        assert sender is not None, "nobody would send to this engine"
        return BySender(sender)
    return OfAdapter(engine) if settings.adapter is not None else OfSegment(engine)


class OfSegment:
    """The workers load the segment themselves, beside the running model where they can.

    Args:
        engine: its name, for errors.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._readers = SegmentReaders()

    async def prepare(self, llm: AsyncLLM, weights: WeightVersion) -> None:
        await self._verify(weights)
        info = update_info(weights.segment, weights.tensors)
        if not any(await llm.collective_rpc("prepare_weights", kwargs={"update_info": info})):
            return
        while True:
            states = await llm.collective_rpc("weight_preparation")
            for _, failure in states:
                self._refuse(weights, failure)
            if all(is_over for is_over, _ in states):
                return
            await asyncio.sleep(PREPARATION_POLL_S)

    async def deliver(self, llm: AsyncLLM, weights: WeightVersion) -> None:
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info=update_info(weights.segment, weights.tensors)))
        await llm.finish_weight_update(weight_version=str(weights.version))

    async def _verify(self, weights: WeightVersion) -> None:
        # off the event loop: generation goes on while the bytes are read
        await asyncio.to_thread(lambda: self._readers.open(weights.segment, weights.tensors).verify())

    def _refuse(self, weights: WeightVersion, failure: str | None) -> None:
        if failure is not None:
            raise WeightsRefused(f"engine {self._engine}, version {weights.version}: {failure}")


class OfAdapter(OfSegment):
    """The segment holds an adapter on the engine's base model."""

    async def prepare(self, llm: AsyncLLM, weights: WeightVersion) -> None:
        await self._verify(weights)
        info = update_info(weights.segment, weights.tensors)
        for failure in await llm.collective_rpc("prepare_adapter", kwargs={"update_info": info}):
            self._refuse(weights, failure)

    async def deliver(self, llm: AsyncLLM, weights: WeightVersion) -> None:
        # vLLM's own update would leave the engine without an adapter at its end
        await llm.collective_rpc("exchange_adapter")
        await llm.update_weight_version(str(weights.version))


class BySender:
    """A sender reads the segment, and calls the engine back with what its workers have to do to receive it."""

    def __init__(self, sender: WeightSender) -> None:
        self._sender = sender

    async def prepare(self, llm: AsyncLLM, weights: WeightVersion) -> None:
        await self._sender.prepare(weights)

    async def deliver(self, llm: AsyncLLM, weights: WeightVersion) -> None:
        await self._sender.send(weights)
        await llm.update_weight_version(str(weights.version))  # vLLM's senders end an update without a version
