"""A rollout worker as a Ray actor: one vLLM engine, and the code that plays groups on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from rlsys.actors.remote import answer
from rlsys.envs.single_turn import SingleTurn
from rlsys.errors import EngineLost
from rlsys.records import LoadReport, Prompt, RolloutGroup, WeightVersion
from rlsys.rollout.play import PlaySpec, play_group
from rlsys.rollout.vllm_settings import VllmSettings


class RolloutActor:
    """Async, so that many groups are played at once. vllm and transformers are imported in the actor's process only."""

    def __init__(self, name: str, settings: VllmSettings) -> None:
        from transformers import AutoTokenizer

        from rlsys.actors.clock import WallClock
        from rlsys.rollout.vllm_engine import VllmEngine

        self._name = name
        self._tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self._engine = VllmEngine(name, settings)
        self._clock = WallClock()

    def __repr__(self) -> str:
        return f"RolloutWorker({self._name})"

    async def start(self) -> None:
        await self._engine.start()

    async def play(self, prompt: Prompt, spec: PlaySpec) -> RolloutGroup:
        return await play_group(
            prompt,
            spec,
            engine=self._engine,
            engine_name=self._name,
            make_env=SingleTurn,
            tokenizer=self._tokenizer,
            clock=self._clock,
        )

    async def load(self, weights: WeightVersion) -> LoadReport:
        return await self._engine.load_weights(weights)

    async def stop(self) -> None:
        await self._engine.stop()


class RayFleet:
    """The controller's handle on all rollout workers."""

    def __init__(self, actors: Mapping[str, Any]) -> None:
        self._actors = dict(actors)

    def names(self) -> Sequence[str]:
        return tuple(self._actors)

    async def start(self) -> None:
        """Bring every engine up. Raises EngineLost or WaitTimeout."""
        starts = [(name, actor.start.remote()) for name, actor in self._actors.items()]
        for name, start in starts:
            await answer(start, name, EngineLost)

    async def play(self, engine: str, prompt: Prompt, spec: PlaySpec) -> RolloutGroup:
        return await answer(self._actors[engine].play.remote(prompt, spec), engine, EngineLost)

    async def load(self, engine: str, weights: WeightVersion) -> LoadReport:
        return await answer(self._actors[engine].load.remote(weights), engine, EngineLost)

    async def remove(self, engine: str) -> None:
        ray.kill(self._actors.pop(engine))

    async def stop(self) -> None:
        for name, actor in self._actors.items():
            await answer(actor.stop.remote(), name, EngineLost)
