"""The real engine: vLLM's ``AsyncLLM`` behind the five methods of ``Engine``.

A weight swap, in order (``load_weights``): verify the bytes and pack the weights while generation goes on; pause at a
token boundary; exchange (or load, where that could not be prepared); resume; probe; hand out. What finishes between
resume and proof is held back until the proof, or lost with it. Requests in flight go on with their KV computed again
(``recompute``) or as it is (``keep``), or end before it (``drain``). How weights get into the workers, whole or as an
adapter on the base model that the engine was started with, is a ``Delivery``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from rlsys.errors import EngineLost, RequestRefused, WaitTimeout, WeightsRefused
from rlsys.records import LoadReport, StopReason, Turn, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.vllm_delivery import WeightSender, delivery_of
from rlsys.rollout.vllm_process import VllmProcess, check_arguments, final_output
from rlsys.rollout.vllm_settings import VllmSettings
from rlsys.weights.probe import TOLERANCE, check_probe
from rlsys.weights.vllm_adapter import ADAPTER_REQUEST
from rlsys.weights.vllm_plugin import BACKEND

PROBE_PRIORITY = -1  # smaller goes first; rollouts have 0
_STOP_REASONS = {"stop": StopReason.EOS, "length": StopReason.LENGTH}
_NOTHING = Turn(
    token_ids_T=np.zeros(0, dtype=np.int32),
    behaviour_logprobs_T=np.zeros(0, dtype=np.float32),
    versions_T=np.zeros(0, dtype=np.int64),
    stop_reason=StopReason.INTERRUPTED,
)


class VllmEngine:
    """One vLLM engine, in processes of its own, driven from this one.

    Args:
        name: appears in every error.
        settings: what it is started with.
        sender: brings versions where ``settings.weight_backend`` is set.

    Raises:
        ConfigError: ``settings.vllm`` names no engine argument of vLLM.
    """

    def __init__(self, name: str, settings: VllmSettings, sender: WeightSender | None = None) -> None:
        check_arguments("rollout.vllm", settings.vllm)
        self._name, self._settings = name, settings
        self._version: Version | None = None
        self._loading = asyncio.Lock()
        self._delivery = delivery_of(name, settings, sender)
        self._is_interrupted = False
        self._proven = asyncio.Event()  # clear while a version is loaded but not proven
        self._proven.set()
        self._adapter = None if settings.adapter is None else ADAPTER_REQUEST
        # at a loss whoever waits for the proof wakes up and finds the engine lost
        self._process = VllmProcess(name, on_loss=self._proven.set, adapter=self._adapter)

    @property
    def version(self) -> Version | None:
        return self._version

    async def start(self) -> None:
        """Raises WaitTimeout or EngineLost if the engine does not come up."""
        arguments = AsyncEngineArgs(
            **self._settings.arguments(on_cpu=current_platform.is_cpu()),
            weight_transfer_config=WeightTransferConfig(backend=self._settings.weight_backend or BACKEND),
        )
        await self._process.start(arguments, self._settings.start_timeout_s)

    def alive(self) -> AsyncLLM:
        """What a sender calls. Raises EngineLost."""
        return self._process.alive()

    async def generate(self, request: GenerateRequest) -> Turn:
        """Raises RequestRefused (this request cannot be served) or EngineLost."""
        self._process.alive()
        if self._version is None:
            raise RequestRefused(f"engine {self._name} serves no proven version yet")
        if self._is_interrupted:
            return _NOTHING
        async with self._deadline(f"request {request.request_id}"):
            output = await self._process.answer(request.token_ids, _sampling(request), request.request_id)
            await self._proven.wait()
        self._process.alive()
        return self._turn(output.outputs[0], request.request_id)

    async def load_weights(self, weights: WeightVersion) -> LoadReport:
        """One load at a time. Raises WeightsRefused: before the swap (then the engine goes on serving what it served),
        or after a failed probe (then it serves nothing any more); or EngineLost."""
        async with self._loading:
            llm = self._process.alive()
            started = perf_counter()
            is_whole = True
            try:
                async with self._deadline(f"weights {weights.version}"):
                    await self._delivery.prepare(llm, weights)
                    is_whole = False
                    paused = await self._pause(llm)
                    await self._delivery.deliver(llm, weights)
                    # the probe is queued before the engine goes on, so that it is in the first batch
                    answers, resumed = await asyncio.gather(self._answer_probe(llm, weights), _resume(llm))
                    difference = await self._prove(weights, answers)
                    is_whole = True
            finally:
                if not is_whole:  # broken off on the way: the engine is paused, its model torn or unproven
                    await self._process.lose(f"the swap to version {weights.version} did not reach its proof")
            return LoadReport(
                engine=self._name,
                version=weights.version,
                pause_s=resumed - paused,
                total_s=perf_counter() - started,
                probe_difference=difference,
            )

    async def interrupt(self) -> None:
        """Raises EngineLost. What was sampled under weights without proof yet is held back here too."""
        self._is_interrupted = True
        async with self._deadline("requests to be let go"):
            await self._process.let_go()

    async def stop(self) -> None:
        """Shut the engine's processes down. Whatever is still in flight raises EngineLost."""
        await self._process.stop()

    async def _pause(self, llm: AsyncLLM) -> float:
        """Returns when generation stood still, as ``perf_counter`` tells it. What the proven version has sampled and
        arrives later waits for the proof of the next one."""
        asked = perf_counter()
        mode = "wait" if self._settings.update_mode == "drain" else "keep"
        # vLLM's ``pause_generation`` is this call and then a sleep of 20 ms, for outputs to arrive before it returns
        await llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=self._settings.update_mode != "keep")
        self._proven.clear()
        return perf_counter() if mode == "wait" else asked

    async def _answer_probe(self, llm: AsyncLLM, weights: WeightVersion) -> list[NDArray[np.float32]]:
        """Log-probabilities of the probe's tokens as the engine computes them now, float32 [T] each."""
        outputs = await asyncio.gather(
            *(
                final_output(
                    llm,
                    token_ids_T.tolist(),
                    _PROBE_SAMPLING,
                    f"probe-{weights.version}-{index}",
                    PROBE_PRIORITY,
                    self._adapter,
                )
                for index, token_ids_T in enumerate(weights.probe.token_ids)
            )
        )
        return [_prompt_logprobs(output) for output in outputs]

    async def _prove(self, weights: WeightVersion, answers: list[NDArray[np.float32]]) -> float:
        tolerance = TOLERANCE[self._settings.dtype]
        try:
            difference = check_probe(answers, weights.probe, weights.previous_probe, tolerance)
        except WeightsRefused as error:
            await self._process.lose(f"version {weights.version} failed its proof: {error}")
            raise WeightsRefused(f"engine {self._name}, version {weights.version}: {error}") from error
        self._version = weights.version
        self._proven.set()
        return difference

    def _turn(self, completion: CompletionOutput, request_id: str) -> Turn:
        stop_reason = _STOP_REASONS.get(completion.finish_reason or "")
        if completion.finish_reason == "abort" and self._is_interrupted:
            stop_reason = StopReason.INTERRUPTED
        if stop_reason is None or completion.weight_versions is None:
            raise EngineLost(f"engine {self._name} ended {request_id} with {completion.finish_reason!r}")
        return Turn(
            token_ids_T=np.asarray(completion.token_ids, dtype=np.int32),
            behaviour_logprobs_T=np.asarray(completion.logprobs.logprobs, dtype=np.float32),  # type: ignore[union-attr]
            versions_T=np.repeat(
                np.asarray([Version.parse(span.version).code for span in completion.weight_versions], dtype=np.int64),
                [span.end - span.start for span in completion.weight_versions],
            ),
            stop_reason=stop_reason,
        )

    @asynccontextmanager
    async def _deadline(self, what: str) -> AsyncIterator[None]:
        """A boundary to the engine's processes: an answer that does not come in time, as every failure on their side,
        means that the engine is lost."""
        seconds = self._settings.timeout_s
        try:
            async with self._process.boundary(what), asyncio.timeout(seconds):
                yield
        except TimeoutError:
            await self._process.lose(str(WaitTimeout(f"{what} on engine {self._name}", seconds)))
            raise self._process.loss() from None


_PROBE_SAMPLING = SamplingParams(
    temperature=1.0,
    max_tokens=1,  # the least that vLLM samples; it is thrown away
    prompt_logprobs=0,
    flat_logprobs=True,
    detokenize=False,
    output_kind=RequestOutputKind.FINAL_ONLY,
)


def _sampling(request: GenerateRequest) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,
        seed=request.seed,
        max_tokens=request.max_tokens,
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,  # lists of numbers instead of one object per token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # made for this request alone
    )


async def _resume(llm: AsyncLLM) -> float:
    """Returns when it went on, as ``perf_counter`` tells it."""
    await llm.resume_generation()
    return perf_counter()


def _prompt_logprobs(output: RequestOutput) -> NDArray[np.float32]:
    """Float32 [T]; index 0 is 0, since nothing predicts the first token."""
    positions = output.prompt_logprobs
    assert positions is not None  # asked for in the sampling parameters
    return np.asarray([0.0, *positions.logprobs], dtype=np.float32)  # type: ignore[union-attr]
