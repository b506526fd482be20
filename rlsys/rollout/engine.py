"""What an inference engine is to rlsys: five methods and a property. ``vllm_engine.py`` is the real one,
``sim_engine.py`` the simulated one; both pass the same contract test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlsys.records import LoadReport, Turn, Version, WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One request for one turn: tokens in.

    Attributes:
        request_id: unique among the requests in flight.
        token_ids: the whole context so far.
        max_tokens: most tokens to sample.
        temperature: 0 means greedy.
        seed: of the sampler; the same request with the same seed on the same weights gives the same tokens.
    """

    request_id: str
    token_ids: list[int]
    max_tokens: int
    temperature: float
    seed: int | None


class Engine(Protocol):
    """Contract:

    * ``generate`` never hands out a token of a version that was not proven: while a swap is being proven its outputs
      are held back, and if the proof fails they are lost (``EngineLost``).
    * ``load_weights`` goes at a token boundary; requests in flight go on under the new weights (KV computed again).
    * every token is stamped with the version that sampled it.
    * after ``interrupt`` it samples nothing more, and answers with what it has.
    """

    async def start(self) -> None:
        """Bring the engine up. Raises RlsysError if it does not come up."""
        ...

    async def generate(self, request: GenerateRequest) -> Turn:
        """Raises RequestRefused (this request cannot be served) or EngineLost."""
        ...

    async def load_weights(self, weights: WeightVersion) -> LoadReport:
        """Prove the bytes, swap, prove the served weights by the probe. Raises WeightsRefused; after a failed probe
        the engine serves nothing any more."""
        ...

    @property
    def version(self) -> Version | None:
        """The proven version that is served; None before the first ``load_weights``."""
        ...

    async def interrupt(self) -> None:
        """Let every request go, those that come later too: their ``generate`` returns what was sampled until now, with
        ``StopReason.INTERRUPTED`` where that is not the end. Raises EngineLost."""
        ...

    async def stop(self) -> None: ...
