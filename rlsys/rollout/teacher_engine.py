"""A teacher's engine: vLLM, which scores rows that are there already."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import FlatLogprobs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rlsys.errors import WaitTimeout
from rlsys.records import TeacherScores
from rlsys.rollout.teacher import TeacherSettings, num_asked, read_scores
from rlsys.rollout.vllm_process import VllmProcess, check_arguments


class TeacherEngine:
    """One vLLM engine with weights that never change.

    Args:
        name: appears in every error.
        settings: what it is started with.
        student_vocab: rows of the student's embedding; no candidate lies beyond them.

    Raises:
        ConfigError: ``settings.vllm`` names no engine argument of vLLM.
    """

    def __init__(self, name: str, settings: TeacherSettings, student_vocab: int) -> None:
        check_arguments("teacher.vllm", settings.vllm)
        self._name, self._settings, self._student_vocab = name, settings, student_vocab
        self._process = VllmProcess(name)

    async def start(self) -> None:
        """Raises WaitTimeout or EngineLost if the engine does not come up."""
        arguments = AsyncEngineArgs(**self._settings.arguments(on_cpu=current_platform.is_cpu()))
        await self._process.start(arguments, self._settings.start_timeout_s)

    async def score(self, rollout_id: str, token_ids_T: NDArray[np.int32]) -> TeacherScores:
        """Raises RequestRefused or WaitTimeout (this row gets no scores, the engine goes on), or EngineLost."""
        what, seconds = f"{rollout_id} on engine {self._name}", self._settings.timeout_s
        async with self._process.boundary(what):
            try:
                async with asyncio.timeout(seconds):
                    output = await self._process.answer(token_ids_T.tolist(), self._sampling(), rollout_id)
            except TimeoutError:
                raise WaitTimeout(f"the scores of {what}", seconds) from None
            self._process.alive()
            flat = output.prompt_logprobs
            assert isinstance(flat, FlatLogprobs)  # asked for in the sampling parameters
            return read_scores(
                token_ids_T,
                flat.token_ids,
                flat.logprobs,
                top_k=self._settings.top_k,
                student_vocab=self._student_vocab,
            )

    async def stop(self) -> None:
        """Shut the engine's processes down. Whatever is still in flight raises EngineLost."""
        await self._process.stop()

    def _sampling(self) -> SamplingParams:
        teacher_vocab = self._process.alive().model_config.get_vocab_size()
        return SamplingParams(
            temperature=0.0,  # of the token that is thrown away; a prompt's log-probabilities are always at 1
            max_tokens=1,  # the least that vLLM samples
            prompt_logprobs=num_asked(
                self._settings.top_k, student_vocab=self._student_vocab, teacher_vocab=teacher_vocab
            ),
            flat_logprobs=True,  # lists of numbers instead of one object per token and candidate
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # A place that comes out of the cache gives no log-probability. vLLM computes such a prompt anew by itself;
            # said here because the scores hang on it.
            skip_reading_prefix_cache=True,
            skip_clone=True,  # made for this request alone
        )
