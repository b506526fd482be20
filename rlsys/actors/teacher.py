"""The teacher as a Ray actor: one vLLM engine that scores the student's rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.actors.remote import answer
from rlsys.errors import TeacherFailed
from rlsys.records import TeacherScores
from rlsys.rollout.teacher import TeacherSettings


class TeacherActor:
    """Async, so that many rollouts are scored at once. vllm and transformers are imported in the actor's process only.

    Args:
        student_path: Hugging Face folder of the student.
    """

    def __init__(self, name: str, settings: TeacherSettings, student_path: str) -> None:
        from transformers import AutoConfig

        from rlsys.rollout.teacher_engine import TeacherEngine

        student = AutoConfig.from_pretrained(student_path).get_text_config()
        self._name = name
        self._engine = TeacherEngine(name, settings, student.vocab_size)

    def __repr__(self) -> str:
        return f"Teacher({self._name})"

    async def start(self) -> None:
        await self._engine.start()

    async def score(self, rollout_id: str, token_ids_T: NDArray[np.int32]) -> TeacherScores:
        return await self._engine.score(rollout_id, token_ids_T)

    async def stop(self) -> None:
        await self._engine.stop()


class RayTeacher:
    """The scorer's handle on the teacher."""

    def __init__(self, name: str, actor: Any) -> None:
        self._name, self._actor = name, actor

    async def start(self) -> None:
        """Bring the engine up. Raises EngineLost, WaitTimeout or TeacherFailed."""
        await answer(self._actor.start.remote(), self._name, TeacherFailed)

    async def score(self, rollout_id: str, token_ids_T: NDArray[np.int32]) -> TeacherScores:
        """Raises RequestRefused or WaitTimeout (this rollout gets no scores), EngineLost or TeacherFailed."""
        return await answer(self._actor.score.remote(rollout_id, token_ids_T), self._name, TeacherFailed)

    async def stop(self) -> None:
        await answer(self._actor.stop.remote(), self._name, TeacherFailed)
