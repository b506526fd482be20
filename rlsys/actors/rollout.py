"""A rollout worker as a Ray actor: one vLLM engine, and the code that plays rollouts on it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rlsys.actors.cluster import Place
from rlsys.actors.mailbox import Ended, Mailbox, Order, Tray
from rlsys.actors.remote import answer
from rlsys.actors.sender import RaySender, Spot, own_spot
from rlsys.envs.single_turn import SingleTurn
from rlsys.errors import EngineLost
from rlsys.records import LoadReport, Prompt, WeightVersion
from rlsys.rollout.engine import Engine
from rlsys.rollout.play import Member, Played, Player, PlaySpec
from rlsys.rollout.router import EngineReport
from rlsys.rollout.vllm_settings import VllmSettings, num_workers
from rlsys.weights.channel import Channel


class RolloutActor:
    """Async, so that rollouts are played side by side. vllm and transformers are imported in the actor's process
    only."""

    def __init__(self, name: str, settings: VllmSettings) -> None:
        from transformers import AutoTokenizer

        from rlsys.actors.clock import WallClock
        from rlsys.rollout.vllm_engine import VllmEngine

        self._name, self._settings = name, settings
        backend = settings.weight_backend
        self._sender = None if backend is None else RaySender(name, backend, num_workers(settings.vllm))
        self._engine = VllmEngine(name, settings, self._sender)
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        played_on, clock = self.played_on(self._engine), WallClock()
        player = Player(played_on, name, make_env=SingleTurn, tokenizer=tokenizer, clock=clock)
        self._tray = Tray(player, clock, settings.slots)

    def played_on(self, engine: Engine) -> Engine:
        """What stands between the rollouts and the engine: nothing, but in a subclass."""
        return engine

    def __repr__(self) -> str:
        return f"RolloutWorker({self._name})"

    async def start(self) -> None:
        await self._engine.start()

    async def begin(self, orders: Sequence[Order], cancelled: Sequence[int]) -> None:
        self._tray.begin(orders, cancelled)

    async def ended(self) -> list[Ended]:
        return await self._tray.ended()

    async def report(self) -> EngineReport:
        from rlsys.rollout.vllm_report import engine_report

        return engine_report(self._settings)

    async def load(self, weights: WeightVersion) -> LoadReport:
        return await self._engine.load_weights(weights)

    async def open_sender(self, spot: Spot | None) -> None:
        """Who brings versions by ``settings.weight_backend``, before the first one comes. None: beside this actor."""
        assert self._sender is not None
        self._sender.open(spot or own_spot())

    # What vLLM's client for Ray calls, by these names; the requests are vLLM's own records.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self._engine.alive().init_weight_transfer_engine(request)

    async def start_weight_update(self) -> None:
        await self._engine.alive().start_weight_update()

    async def update_weights(self, request: Any) -> None:
        await self._engine.alive().update_weights(request)

    async def finish_weight_update(self) -> None:
        await self._engine.alive().finish_weight_update()

    async def interrupt(self) -> None:
        await self._engine.interrupt()

    async def stop(self) -> None:
        await self._engine.stop()


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """A rollout worker as the driver knows it.

    Attributes:
        place: what Ray holds for it.
        channel: by which weights come to its machine.
    """

    actor: Any
    place: Place
    channel: Channel


class RayFleet:
    """The controller's handle on all rollout workers."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._mailboxes: dict[str, Mailbox] = {}

    def names(self) -> Sequence[str]:
        return tuple(self._workers)

    def nodes(self) -> dict[str, str]:
        """Every engine, with Ray's id of its machine."""
        return {name: worker.place.node for name, worker in self._workers.items()}

    def channel_at(self, node: str) -> Channel | None:
        """By which weights come to a machine; None where there is none, or none of any use."""
        channels = (worker.channel for worker in self._workers.values() if worker.place.node == node)
        return next((channel for channel in channels if not channel.is_lost), None)

    def admit(self, name: str, worker: Worker) -> None:
        """An engine that is up."""
        self._workers[name] = worker
        self._mailboxes[name] = Mailbox(worker.actor, name)

    async def play(self, engine: str, prompt: Prompt, member: Member, spec: PlaySpec) -> Played:
        self._worker(engine)
        return await self._mailboxes[engine].play(prompt, member, spec)

    async def interrupt(self, engine: str) -> None:
        await answer(self._worker(engine).actor.interrupt.remote(), engine, EngineLost)
        await self._mailboxes[engine].emptied()

    async def report(self, engine: str) -> EngineReport:
        return await answer(self._worker(engine).actor.report.remote(), engine, EngineLost)

    async def load(self, engine: str, weights: WeightVersion) -> LoadReport:
        worker = self._worker(engine)
        async with worker.channel.holding(weights) as there:
            return await answer(worker.actor.load.remote(there), engine, EngineLost)

    async def remove(self, engine: str) -> None:
        """Its resources are free again; a channel goes with the last engine that loads by it."""
        self._mailboxes.pop(engine).close()
        worker = self._workers.pop(engine)
        ray.kill(worker.actor)
        if all(other.channel is not worker.channel for other in self._workers.values()):
            worker.channel.close()
        await asyncio.to_thread(worker.place.free)

    async def stop(self) -> None:
        for name, worker in self._workers.items():
            self._mailboxes[name].close()
            await answer(worker.actor.stop.remote(), name, EngineLost)

    def _worker(self, engine: str) -> Worker:
        """A slot may be handed out in the very moment in which its engine is removed: that is a loss like any other."""
        if engine not in self._workers:
            raise EngineLost(f"{engine} is out of service")
        return self._workers[engine]
