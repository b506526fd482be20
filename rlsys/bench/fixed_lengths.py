"""Answers whose lengths are known beforehand: each run that is compared then has the very same work to do.

Lengths are log-normal, as those of real answers roughly are: most are short, and a few are very long.
"""

from __future__ import annotations

import math
from dataclasses import replace
from hashlib import blake2b
from statistics import NormalDist

from rlsys.actors.rollout import RolloutActor
from rlsys.records import LoadReport, Turn, Version, WeightVersion
from rlsys.rollout.engine import Engine, GenerateRequest

MEDIAN_TOKENS, PERCENTILE_99_TOKENS = 16, 256
LOG_LENGTH = NormalDist(
    mu=math.log(MEDIAN_TOKENS),
    sigma=math.log(PERCENTILE_99_TOKENS / MEDIAN_TOKENS) / NormalDist().inv_cdf(0.99),
)
CHANCE_BITS = 52  # one more, and the largest chance would be rounded to 1


def answer_length(rollout_id: str, longest: int) -> int:
    """Sampled tokens of a rollout, 1 to ``longest``: the same in every process and in every run.

    Example:
        >>> answer_length("sums:0:3#0/2", longest=400)
        61
    """
    digest = int.from_bytes(blake2b(rollout_id.encode(), digest_size=8).digest())
    chance = ((digest >> (64 - CHANCE_BITS)) + 0.5) / (1 << CHANCE_BITS)
    return min(longest, max(1, round(math.exp(LOG_LENGTH.inv_cdf(chance)))))


class FixedLengths:
    """An engine whose answers are cut at the lengths of ``answer_length``, the request's own limit being the longest.
    Its model must have no end of sequence, or else some answers are shorter."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def start(self) -> None:
        await self._engine.start()

    async def generate(self, request: GenerateRequest) -> Turn:
        rollout_id = request.request_id.rpartition(":")[0]  # behind it stands the number of the turn
        length = answer_length(rollout_id, request.max_tokens)
        return await self._engine.generate(replace(request, max_tokens=length))

    async def load_weights(self, weights: WeightVersion) -> LoadReport:
        return await self._engine.load_weights(weights)

    async def interrupt(self) -> None:
        await self._engine.interrupt()

    @property
    def version(self) -> Version | None:
        return self._engine.version

    async def stop(self) -> None:
        await self._engine.stop()


class FixedLengthRollouts(RolloutActor):
    """A rollout worker that plays rollouts of fixed lengths."""

    def played_on(self, engine: Engine) -> Engine:
        return FixedLengths(engine)


def parity(prompt: str, completion: str, answer: str) -> float:
    """A reward that differs within a group whatever the model has learned, so that every step has a gradient."""
    return float(sum(map(ord, completion)) % 2)
