"""The simulated engine: same contract as the real one, on a clock that is handed in. Serves the simulator and tests.

Time inside it is served time: seconds since the start less the pauses. Token t of a request is emitted when
``(t + 1) / tokens_per_s`` seconds have been served since the request came, so a request costs one sleep plus one per
pause, and the version of every token follows from the served times of the swaps.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from rlsys.errors import EngineLost, RequestRefused, WeightsRefused
from rlsys.records import LoadReport, StopReason, Turn, Version, WeightVersion
from rlsys.rollout.clock import Clock
from rlsys.rollout.engine import GenerateRequest

Answer = Callable[[GenerateRequest, Version], list[int]]
_INSTANT_S = 1e-9  # rounding of sums of seconds


class SimEngine:
    """Emits the tokens that ``answer`` gives for a request and the version served when it came.

    Args:
        answer: the tokens to sample; what exceeds the request's ``max_tokens`` is cut off.
        tokens_per_s: speed of one request, however many run.
        max_model_len: a prompt as long as this, or longer, is refused.
        pause_s, proof_s: how long a swap pauses, and how long its proof takes afterwards.
        refuse: the reason to refuse a version before the swap; None from it means that the bytes are right.
        is_wrong: whether a version fails its probe.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        answer: Answer,
        *,
        tokens_per_s: float = 100.0,
        max_model_len: int = 1 << 20,
        pause_s: float = 0.03,
        proof_s: float = 0.01,
        refuse: Callable[[WeightVersion], str | None] = lambda weights: None,
        is_wrong: Callable[[WeightVersion], bool] = lambda weights: False,
    ) -> None:
        self._name, self._clock, self._answer = name, clock, answer
        self._tokens_per_s, self._max_model_len = tokens_per_s, max_model_len
        self._pause_s, self._proof_s = pause_s, proof_s
        self._refuse, self._is_wrong = refuse, is_wrong
        self._version: Version | None = None
        self._swapped_at_s: list[float] = []  # served time of each swap, and the version that it brought
        self._swapped_to: list[Version] = []
        self._served_s = 0.0
        self._served_until = clock.now()
        self._running, self._proven, self._lost = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._interrupted = asyncio.Event()
        self._running.set()
        self._proven.set()
        self._loss = ""
        self._loading = asyncio.Lock()

    @property
    def version(self) -> Version | None:
        return self._version

    async def start(self) -> None:
        """Nothing to bring up."""

    async def generate(self, request: GenerateRequest) -> Turn:
        self._check_alive()
        if self._version is None:
            raise RequestRefused(f"engine {self._name} serves no proven version yet")
        if len(request.token_ids) >= self._max_model_len:
            raise RequestRefused(
                f"engine {self._name} refused {request.request_id}: prompt of {len(request.token_ids)} tokens, "
                f"context of {self._max_model_len}"
            )
        token_ids = self._answer(request, self._swapped_to[-1])
        is_cut = len(token_ids) > request.max_tokens
        token_ids = token_ids[: request.max_tokens]
        started_s = self._served_now()
        served_s = await self._serve_until(started_s + len(token_ids) / self._tokens_per_s) - started_s
        num_served = math.floor((served_s + 2 * _INSTANT_S) * self._tokens_per_s)
        is_whole, token_ids = num_served >= len(token_ids), token_ids[:num_served]
        if not self._proven.is_set():
            await self._unless_lost(self._proven.wait())
        self._check_alive()
        return Turn(
            token_ids_T=np.asarray(token_ids, dtype=np.int32),
            behaviour_logprobs_T=np.full(len(token_ids), -1.0, dtype=np.float32),
            versions_T=self._versions(started_s, len(token_ids)),
            stop_reason=(StopReason.LENGTH if is_cut else StopReason.EOS) if is_whole else StopReason.INTERRUPTED,
        )

    async def interrupt(self) -> None:
        self._check_alive()
        self._interrupted.set()

    async def load_weights(self, weights: WeightVersion) -> LoadReport:
        async with self._loading:
            self._check_alive()
            reason = self._refuse(weights)
            if reason is not None:
                raise WeightsRefused(f"engine {self._name}, version {weights.version}: {reason}")
            started = self._clock.now()
            try:
                resumed = await self._swap(weights.version)
                await self._unless_lost(self._clock.sleep(self._proof_s))
                if self._is_wrong(weights):
                    self._loss = f"version {weights.version} failed its proof"
                    raise WeightsRefused(f"engine {self._name}, version {weights.version}: probe failed")
                self._version = weights.version
                self._proven.set()
            finally:
                if not self._proven.is_set():
                    self._lose(f"the swap to version {weights.version} did not reach its proof")
            return LoadReport(
                engine=self._name,
                version=weights.version,
                pause_s=resumed - started,
                total_s=self._clock.now() - started,
                probe_difference=0.0,
            )

    async def stop(self) -> None:
        self._lose("it was stopped")

    def crash(self) -> None:
        """Die: what is in flight and whatever comes later raises EngineLost."""
        self._lose("it crashed")

    async def _swap(self, version: Version) -> float:
        """Returns when it went on."""
        self._served_now()
        self._running.clear()
        self._proven.clear()
        await self._unless_lost(self._clock.sleep(self._pause_s))
        self._swapped_at_s.append(self._served_s)
        self._swapped_to.append(version)
        self._served_until = self._clock.now()
        self._running.set()
        return self._served_until

    def _lose(self, loss: str) -> None:
        self._loss = self._loss or loss
        self._lost.set()

    def _check_alive(self) -> None:
        if self._lost.is_set():
            raise EngineLost(f"engine {self._name} is lost: {self._loss}")

    def _served_now(self) -> float:
        """Advance the served time to now."""
        now = self._clock.now()
        if self._running.is_set():
            self._served_s += now - self._served_until
        self._served_until = now
        return self._served_s

    async def _serve_until(self, end_s: float) -> float:
        """Returns the served time when it ended: at ``end_s``, or when the engine was interrupted."""
        while not self._interrupted.is_set():
            if not self._running.is_set():
                await self._unless_lost(self._running.wait(), self._interrupted.wait())
                continue
            missing_s = end_s - self._served_now()
            if missing_s <= _INSTANT_S:
                break
            await self._unless_lost(self._clock.sleep(missing_s), self._interrupted.wait())
        return self._served_now()

    async def _unless_lost(self, *waited: Coroutine[Any, Any, Any]) -> None:
        """Await any of them; raises EngineLost as soon as the engine is lost."""
        tasks = {asyncio.ensure_future(one) for one in (*waited, self._lost.wait())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        self._check_alive()

    def _versions(self, started_s: float, num_tokens: int) -> np.ndarray:
        emitted_s_T = started_s + np.arange(1, num_tokens + 1) / self._tokens_per_s
        # a token emitted at the very moment of a swap came before it: a pause falls on a token boundary
        swap_T = np.searchsorted(np.asarray(self._swapped_at_s), emitted_s_T - _INSTANT_S, side="left") - 1
        codes = np.asarray([version.code for version in self._swapped_to], dtype=np.int64)
        return codes[swap_T]


def learning_answer(
    right_answer: Callable[[list[int]], list[int]], *, vocab_size: int, half_life_steps: float, max_tokens: int
) -> Answer:
    """An ``answer`` that learns: right with probability ``1 - 2 ** (-step / half_life_steps)``, else random tokens.
    Deterministic: the same request with the same seed on the same version gets the same tokens.

    Args:
        right_answer: from the prompt's tokens to those of the right answer, end-of-sequence token included.
        max_tokens: longest random answer.
    """

    def answer(request: GenerateRequest, version: Version) -> list[int]:
        generator = np.random.default_rng([request.seed or 0, version.code, *request.token_ids])
        if generator.random() < 1.0 - math.exp2(-version.step / half_life_steps):
            return right_answer(request.token_ids)
        length = int(generator.integers(1, max_tokens + 1))
        return [int(token) for token in generator.integers(0, vocab_size, size=length)]

    return answer
