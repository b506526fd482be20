"""A reward worker as a Ray actor: the user's function runs in its process, which may be killed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from rlsys.actors.remote import answer
from rlsys.records import Prompt
from rlsys.reward.result import Completion, Outcome, WorkerDied


class RewardActor:
    """A plain actor, so that the function runs in the main thread, where its deadline can interrupt it."""

    def __init__(self, name: str, path: str, timeout_s: float) -> None:
        from rlsys.reward.load import load_reward

        self._name, self._timeout_s = name, timeout_s
        self._function = load_reward(path)

    def __repr__(self) -> str:
        return f"RewardWorker({self._name})"

    def ready(self) -> None:
        """Answers once the process is up and the function imported."""

    def score(self, prompt: Prompt, completions: list[Completion]) -> list[Outcome]:
        from rlsys.reward.call import score_members

        return score_members(self._function, prompt, completions, self._timeout_s)


class RayRewardWorker:
    """The pool's handle on one reward process.

    Args:
        name: of the worker.
        create: makes a new actor; called again after every kill.
    """

    def __init__(self, name: str, create: Callable[[], Any]) -> None:
        self._name, self._create = name, create
        self._actor = create()

    async def ready(self) -> None:
        await answer(self._actor.ready.remote(), self._name, WorkerDied)

    async def score(self, prompt: Prompt, completions: list[Completion]) -> list[Outcome]:
        return await answer(self._actor.score.remote(prompt, completions), self._name, WorkerDied)

    async def restart(self) -> None:
        ray.kill(self._actor)
        self._actor = self._create()
        await self.ready()
