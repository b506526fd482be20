"""vLLM's ``AsyncLLM`` as every engine here is built on it: brought up, asked, lost, shut down."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import fields

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError, VLLMServerError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from rlsys.errors import ConfigError, EngineLost, RequestRefused, RlsysError, WaitTimeout
from rlsys.weights.owner import own_children

ABORT_POLL_S = 0.01


class VllmProcess:
    """An engine in processes of its own, and whether it can still be relied on. Once it is lost it stays lost.

    Args:
        name: appears in every error.
        on_loss: called when it is lost, so that whoever waits for something of it wakes up.
        adapter: that every request is answered with; None: the model as it is.
    """

    def __init__(
        self, name: str, on_loss: Callable[[], None] = lambda: None, adapter: LoRARequest | None = None
    ) -> None:
        self._name, self._on_loss, self._adapter = name, on_loss, adapter
        self._llm: AsyncLLM | None = None
        self._lost: str | None = None
        self._in_flight: set[str] = set()

    async def start(
        self,
        arguments: AsyncEngineArgs,
        timeout_s: float,
    ) -> None:
        """Raises WaitTimeout or EngineLost if the engine does not come up."""
        own_children()
        try:
            async with asyncio.timeout(timeout_s):
                # in a thread: it blocks until the engine's processes are up
                self._llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        except TimeoutError:
            raise WaitTimeout(f"engine {self._name} to start", timeout_s) from None
        except (RuntimeError, ValueError, OSError, VLLMServerError) as error:
            raise EngineLost(f"engine {self._name} did not start: {type(error).__name__}: {error}") from error

    def alive(self) -> AsyncLLM:
        """Raises EngineLost."""
        if self._lost is not None:
            raise self.loss()
        if self._llm is None:
            raise EngineLost(f"engine {self._name} was not started")
        return self._llm

    async def answer(self, token_ids: list[int], sampling: SamplingParams, request_id: str) -> RequestOutput:
        """The final output, cut short where the engine was lost meanwhile. Raises RequestRefused or EngineLost."""
        llm = self.alive()
        self._in_flight.add(request_id)
        try:
            return await final_output(llm, token_ids, sampling, request_id, adapter=self._adapter)
        except VLLMClientError as error:
            raise RequestRefused(f"engine {self._name} refused {request_id}: {error}") from error
        finally:
            self._in_flight.discard(request_id)

    @asynccontextmanager
    async def boundary(self, what: str) -> AsyncIterator[None]:
        """Around whatever asks the engine's processes: every failure on their side means that the engine is lost.
        Deadlines of the caller, and errors of ours, pass through."""
        try:
            yield
        except (RlsysError, TimeoutError):
            raise
        except Exception as error:  # vLLM hands failures of its worker process over as plain Exception
            await self.lose(f"{what}: {type(error).__name__}: {error}")
            raise self.loss() from error

    async def let_go(self) -> None:
        """End what is in flight: its outputs come back cut short."""
        while self._in_flight:  # one that has not reached vLLM yet is not known there
            await self.alive().abort(tuple(self._in_flight))
            await asyncio.sleep(ABORT_POLL_S)

    async def lose(self, reason: str) -> None:
        """Serve nothing from now on, and end what is in flight."""
        self._lost = self._lost or reason
        self._on_loss()
        if self._llm is not None:
            await self._llm.abort(tuple(self._in_flight))

    def loss(self) -> EngineLost:
        return EngineLost(f"engine {self._name} is lost: {self._lost}")

    async def stop(self) -> None:
        """Shut the engine's processes down. Whatever is still in flight raises EngineLost."""
        await self.lose("it was stopped")
        if self._llm is not None:
            if self._llm.output_handler is not None:  # it would take the end of the processes for a failure
                self._llm.output_handler.cancel()
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None


async def final_output(
    llm: AsyncLLM,
    token_ids: list[int],
    sampling: SamplingParams,
    request_id: str,
    priority: int = 0,
    adapter: LoRARequest | None = None,
) -> RequestOutput:
    final = None
    outputs = llm.generate(tokens_input(token_ids), sampling, request_id, lora_request=adapter, priority=priority)
    async for output in outputs:
        final = output
    assert final is not None  # vLLM yields the final output or raises
    return final


def check_arguments(key: str, names: Iterable[str]) -> None:
    """Raises ConfigError where one of ``names``, given under the config key ``key``, is no engine argument of vLLM."""
    known = [argument.name for argument in fields(AsyncEngineArgs)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{key}.{name}",
                got="no argument of vLLM's engine",
                wanted="an engine argument of vLLM",
                remedy=f"did you mean {near[0]}?" if near else "remove it",
            )
