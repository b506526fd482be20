"""The simulated engine obeys the engine contract, on a virtual clock where every time is exact."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rlsys.errors import EngineLost, RequestRefused, WeightsRefused
from rlsys.records import Probe, StopReason, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.sim_engine import SimEngine, learning_answer
from rlsys.sim.clock import VirtualClock
from tests.engine_contract import check_engine_contract, check_interruption


def _weights(step: int) -> WeightVersion:
    probe = Probe(token_ids=(), logprobs=())
    return WeightVersion(
        version=Version(incarnation=0, step=step), segment="s", tensors=(), probe=probe, previous_probe=None
    )


def _request(max_tokens: int = 20, num_prompt_tokens: int = 3) -> GenerateRequest:
    return GenerateRequest(
        request_id="r", token_ids=[1] * num_prompt_tokens, max_tokens=max_tokens, temperature=1.0, seed=5
    )


def _engine(clock: VirtualClock, **options) -> SimEngine:
    """Ten tokens a second, always 20 tokens and more; a swap pauses for 1 s and is proven 2 s later."""
    options = {"tokens_per_s": 10.0, "pause_s": 1.0, "proof_s": 2.0} | options
    return SimEngine("sim-0", clock, lambda request, version: list(range(30)), **options)


def test_simulated_engine_obeys_the_contract():
    clock = VirtualClock()
    engine = _engine(clock, refuse=lambda weights: "wrong bytes" if weights.version.step == 9 else None)

    turn = clock.run(
        check_engine_contract(
            engine,
            first=_weights(1),
            second=_weights(2),
            refused=_weights(9),
            request=_request(),
            clock=clock,
        )
    )
    # 20 tokens take 2 s: they come at 0.1, 0.2, ... 0.6, and the pause at 0.667
    assert [Version.from_code(code).step for code in turn.versions_T] == [1] * 6 + [2] * 14
    assert turn.stop_reason is StopReason.LENGTH


def test_outputs_are_held_until_the_proof_and_the_pause_delays_them():
    async def play() -> tuple[float, float]:
        await engine.load_weights(_weights(1))
        start = clock.now()
        short = asyncio.create_task(engine.generate(_request(max_tokens=6)))  # alone: done after 0.6 s
        long = asyncio.create_task(engine.generate(_request(max_tokens=28)))  # alone: done after 2.8 s
        await clock.sleep(0.55)
        report = await engine.load_weights(_weights(2))
        assert (report.pause_s, report.total_s) == pytest.approx((1.0, 3.0))
        assert not short.done()  # its sixth token came 0.05 s after the pause, unproven until now
        assert [Version.from_code(code).step for code in (await short).versions_T] == [1] * 5 + [2]
        short_s = clock.now() - start
        await long
        return short_s, clock.now() - start

    clock = VirtualClock()
    engine = _engine(clock)
    assert clock.run(play()) == pytest.approx((0.55 + 3.0, 2.8 + 1.0))


def test_after_a_failed_proof_nothing_is_served():
    async def play() -> None:
        await engine.load_weights(_weights(1))
        in_flight = asyncio.create_task(engine.generate(_request(max_tokens=6)))
        await clock.sleep(0.55)
        with pytest.raises(WeightsRefused, match="probe failed"):
            await engine.load_weights(_weights(2))
        with pytest.raises(EngineLost, match="version 0.2 failed its proof"):
            await in_flight
        with pytest.raises(EngineLost, match="sim-0"):
            await engine.generate(_request())
        with pytest.raises(EngineLost):
            await engine.load_weights(_weights(3))
        assert engine.version == Version(incarnation=0, step=1)

    clock = VirtualClock()
    engine = _engine(clock, is_wrong=lambda weights: weights.version.step == 2)
    clock.run(play())


def test_a_crash_ends_what_is_in_flight_at_once():
    async def play() -> None:
        await engine.load_weights(_weights(1))
        in_flight = asyncio.create_task(engine.generate(_request()))
        await clock.sleep(0.55)
        engine.crash()
        crashed = clock.now()
        with pytest.raises(EngineLost, match="it crashed"):
            await in_flight
        assert clock.now() == crashed
        with pytest.raises(EngineLost, match="it crashed"):
            await engine.generate(_request())

    clock = VirtualClock()
    engine = _engine(clock)
    clock.run(play())


def test_an_interrupted_engine_hands_out_what_it_has_and_samples_nothing_more():
    async def play() -> None:
        await engine.load_weights(_weights(1))
        await check_interruption(engine, _request(), clock)

    clock = VirtualClock()
    engine = _engine(clock)
    clock.run(play())


def test_what_is_interrupted_in_a_swap_is_held_until_the_proof_and_has_the_tokens_before_the_pause():
    async def play() -> None:
        await engine.load_weights(_weights(1))
        in_flight = asyncio.create_task(engine.generate(_request()))
        await clock.sleep(0.55)
        load = asyncio.create_task(engine.load_weights(_weights(2)))
        await clock.sleep(0.5)  # in the middle of the pause
        await engine.interrupt()
        assert not in_flight.done()
        await load
        turn = await in_flight
        assert turn.stop_reason is StopReason.INTERRUPTED
        assert [Version.from_code(code).step for code in turn.versions_T] == [1] * 5

    clock = VirtualClock()
    engine = _engine(clock)
    clock.run(play())


def test_an_answer_that_is_at_its_end_when_it_is_interrupted_is_whole():
    async def play() -> None:
        await engine.load_weights(_weights(1))
        in_flight = asyncio.create_task(engine.generate(_request(max_tokens=5)))
        await clock.sleep(0.5)
        await engine.interrupt()
        assert (await in_flight).stop_reason is StopReason.LENGTH

    clock = VirtualClock()
    engine = _engine(clock)
    clock.run(play())


def test_a_prompt_beyond_the_context_is_refused_and_the_engine_goes_on():
    async def play() -> None:
        await engine.load_weights(_weights(1))
        with pytest.raises(RequestRefused, match="context of 8"):
            await engine.generate(_request(num_prompt_tokens=8))
        assert len((await engine.generate(_request(num_prompt_tokens=7))).token_ids_T) == 20

    clock = VirtualClock()
    engine = _engine(clock, max_model_len=8)
    clock.run(play())


def test_learning_answers_are_right_more_often_with_every_step_and_repeatable():
    right = [3, 1, 4, 1, 5, 9]
    answer = learning_answer(lambda token_ids: right, vocab_size=100, half_life_steps=4, max_tokens=6)

    def share(step: int) -> float:
        version = Version(incarnation=0, step=step)
        requests = [
            GenerateRequest(request_id="r", token_ids=[7], max_tokens=9, temperature=1.0, seed=seed)
            for seed in range(400)
        ]
        answers = [answer(request, version) for request in requests]
        assert answers == [answer(request, version) for request in requests]
        return float(np.mean([tokens == right for tokens in answers]))

    assert share(0) == 0.0
    assert share(4) == pytest.approx(0.5, abs=0.1)  # four standard deviations of 400 draws
    assert share(8) == pytest.approx(0.75, abs=0.09)
