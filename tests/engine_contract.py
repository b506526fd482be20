"""What every engine must do, simulated or real: the tests that both pass."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rlsys.errors import RequestRefused, WeightsRefused
from rlsys.records import StopReason, Turn, WeightVersion
from rlsys.rollout.clock import Clock
from rlsys.rollout.engine import Engine, GenerateRequest


async def check_engine_contract(
    engine: Engine,
    *,
    first: WeightVersion,
    second: WeightVersion,
    refused: WeightVersion,
    request: GenerateRequest,
    clock: Clock,
) -> Turn:
    """Drive a started engine through two versions. ``request`` must run to its token limit under both. Returns the turn
    that lived through the swap, which came after a third of it."""
    with pytest.raises(RequestRefused):
        await engine.generate(request)  # nothing is proven yet
    assert engine.version is None

    report = await engine.load_weights(first)
    assert report.version == first.version == engine.version
    before = await engine.generate(request)
    assert set(before.versions_T) == {first.version.code}
    started = clock.now()
    again = await engine.generate(request)
    seconds = clock.now() - started
    assert again.token_ids_T.tolist() == before.token_ids_T.tolist()

    in_flight = asyncio.create_task(engine.generate(request))
    await clock.sleep(seconds / 3)
    await engine.load_weights(second)
    turn = await in_flight
    num_before = int(np.count_nonzero(turn.versions_T == first.version.code))
    assert 0 < num_before < request.max_tokens == len(turn.token_ids_T)
    assert set(turn.versions_T[num_before:]) == {second.version.code}
    assert turn.token_ids_T[:num_before].tolist() == before.token_ids_T[:num_before].tolist()

    with pytest.raises(WeightsRefused):
        await engine.load_weights(refused)
    assert engine.version == second.version
    after = await engine.generate(request)
    assert set(after.versions_T) == {second.version.code}
    return turn


async def check_interruption(engine: Engine, request: GenerateRequest, clock: Clock) -> None:
    """Interrupt an engine that serves: it is of no more use afterwards. ``request`` must not end by itself."""
    started = clock.now()
    whole = await engine.generate(request)
    seconds = clock.now() - started
    in_flight = asyncio.create_task(engine.generate(request))
    await clock.sleep(seconds / 3)
    await engine.interrupt()
    begun, late = await in_flight, await engine.generate(request)
    num_begun = len(begun.token_ids_T)
    assert 0 < num_begun < len(whole.token_ids_T) and len(late.token_ids_T) == 0
    assert begun.stop_reason is late.stop_reason is StopReason.INTERRUPTED
    assert begun.token_ids_T.tolist() == whole.token_ids_T[:num_begun].tolist()
    assert begun.versions_T.tolist() == whole.versions_T[:num_begun].tolist()
    np.testing.assert_allclose(begun.behaviour_logprobs_T, whole.behaviour_logprobs_T[:num_begun], atol=1e-4)
