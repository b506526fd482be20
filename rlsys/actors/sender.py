"""A sender of weights as a Ray actor, one for each engine: on the GPU of somebody else, which stays theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.actors.remote import answer
from rlsys.errors import EngineLost
from rlsys.records import WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """Where a sender is to be.

    Attributes:
        node: Ray's id of the machine.
        gpu: the one that it sends from, as CUDA numbers them there; None: from the machine's memory.
    """

    node: str
    gpu: str | None

    def environment(self) -> dict[str, str]:
        """Variables of a process that sees this GPU, though Ray holds none for it."""
        if self.gpu is None:
            return {}
        # without the second one Ray would hide every GPU from it
        return {"CUDA_VISIBLE_DEVICES": self.gpu, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def own_spot() -> Spot:
    """That of the calling actor: its machine, and its first GPU."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return Spot(node=context.get_node_id(), gpu=gpus[0] if gpus else None)


class SenderActor:
    """A plain actor: it does what its engine asks for, one after the other, and calls the engine back meanwhile.

    Args:
        engine: the actor that drives the engine.
    """

    def __init__(self, backend: str, engine: Any, workers: int, device: str) -> None:
        from rlsys.weights.vllm_sender import Sender, client_of

        host = ray.util.get_node_ip_address()
        self._sender = Sender(backend, client_of(engine), host=host, workers=workers, device=device)

    def __repr__(self) -> str:
        return "WeightSender"

    def prepare(self, weights: WeightVersion) -> None:
        self._sender.prepare(weights)

    def send(self, weights: WeightVersion) -> None:
        self._sender.send(weights)


class RaySender:
    """An engine's handle on its sender. The actor is the engine's own: it ends when the engine's actor does.

    Args:
        engine: its name, for errors.
        backend: of vLLM.
        workers: processes that the engine computes in.
    """

    def __init__(self, engine: str, backend: str, workers: int) -> None:
        self._name, self._backend, self._workers = f"the weight sender of {engine}", backend, workers
        self._actor: Any = None

    def open(self, spot: Spot) -> None:
        """Called by the engine's actor, before the first version."""
        options = {
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=spot.node, soft=False),
            "runtime_env": {"env_vars": spot.environment()},
        }
        engine = ray.get_runtime_context().current_actor
        device = "cpu" if spot.gpu is None else "cuda"
        self._actor = ray.remote(SenderActor).options(**options).remote(self._backend, engine, self._workers, device)

    async def prepare(self, weights: WeightVersion) -> None:
        """Raises WeightsRefused or EngineLost."""
        await answer(self._actor.prepare.remote(weights), self._name, EngineLost)

    async def send(self, weights: WeightVersion) -> None:
        """Raises EngineLost."""
        await answer(self._actor.send.remote(weights), self._name, EngineLost)
