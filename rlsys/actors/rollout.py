"""A rollout worker as a Ray actor: one vLLM engine, and the code that plays rollouts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ray

from rlsys.actors.mailbox import Ended, Mailbox, Order, Tray
from rlsys.actors.mirror import NodeMirror
from rlsys.actors.remote import answer
from rlsys.envs.single_turn import SingleTurn
from rlsys.errors import EngineLost
from rlsys.records import DroppedRollout, LoadReport, Prompt, Rollout, WeightVersion
from rlsys.rollout.engine import Engine
from rlsys.rollout.play import Member, Player, PlaySpec
from rlsys.rollout.router import EngineReport
from rlsys.rollout.vllm_settings import VllmSettings


class RolloutActor:
    """Async, so that rollouts are played side by side. vllm and transformers are imported in the actor's process
    only."""

    def __init__(self, name: str, settings: VllmSettings) -> None:
        from transformers import AutoTokenizer

        from rlsys.actors.clock import WallClock
        from rlsys.rollout.vllm_engine import VllmEngine

        self._name, self._settings = name, settings
        self._engine = VllmEngine(name, settings)
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        played_on = self.played_on(self._engine)
        self._tray = Tray(Player(played_on, name, make_env=SingleTurn, tokenizer=tokenizer, clock=WallClock()))

    def played_on(self, engine: Engine) -> Engine:
        """What stands between the rollouts and the engine: nothing, but in a subclass."""
        return engine

    def __repr__(self) -> str:
        return f"RolloutWorker({self._name})"

    async def start(self) -> None:
        await self._engine.start()

    async def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    async def begin(self, orders: Sequence[Order], cancelled: Sequence[int]) -> None:
        self._tray.begin(orders, cancelled)

    async def ended(self) -> list[Ended]:
        return await self._tray.ended()

    async def report(self) -> EngineReport:
        from rlsys.rollout.vllm_report import engine_report

        return engine_report(self._settings)

    async def load(self, weights: WeightVersion) -> LoadReport:
        return await self._engine.load_weights(weights)

    async def stop(self) -> None:
        await self._engine.stop()


class RayFleet:
    """The controller's handle on all rollout workers."""

    def __init__(self, actors: Mapping[str, Any]) -> None:
        self._actors = dict(actors)
        self._mailboxes = {name: Mailbox(actor, name) for name, actor in actors.items()}
        self._mirrors: dict[str, NodeMirror] = {}

    def names(self) -> Sequence[str]:
        return tuple(self._actors)

    async def start(self) -> None:
        """Bring every engine up. Raises EngineLost or WaitTimeout."""
        starts = [(name, actor.start.remote()) for name, actor in self._actors.items()]
        for name, start in starts:
            await answer(start, name, EngineLost)

    async def play(self, engine: str, prompt: Prompt, member: Member, spec: PlaySpec) -> Rollout | DroppedRollout:
        self._actor(engine)
        return await self._mailboxes[engine].play(prompt, member, spec)

    async def report(self, engine: str) -> EngineReport:
        return await answer(self._actor(engine).report.remote(), engine, EngineLost)

    async def nodes(self) -> dict[str, list[str]]:
        """Ray's ids of the machines, and the engines on each."""
        engines_at: dict[str, list[str]] = {}
        for name, actor in self._actors.items():
            engines_at.setdefault(await answer(actor.node.remote(), name, EngineLost), []).append(name)
        return engines_at

    def load_through(self, engines: Sequence[str], mirror: NodeMirror) -> None:
        """These engines load from ``mirror``, which is on their machine."""
        self._mirrors |= dict.fromkeys(engines, mirror)

    async def load(self, engine: str, weights: WeightVersion) -> LoadReport:
        mirror = self._mirrors.get(engine)
        async with mirror.holding(weights) if mirror else nullcontext(weights) as there:
            return await answer(self._actor(engine).load.remote(there), engine, EngineLost)

    async def remove(self, engine: str) -> None:
        self._mailboxes.pop(engine).close()
        ray.kill(self._actors.pop(engine))

    async def stop(self) -> None:
        for name, actor in self._actors.items():
            self._mailboxes[name].close()
            await answer(actor.stop.remote(), name, EngineLost)

    def _actor(self, engine: str) -> Any:
        """A slot may be handed out in the very moment in which its engine is removed: that is a loss like any other."""
        if engine not in self._actors:
            raise EngineLost(f"{engine} is out of service")
        return self._actors[engine]
