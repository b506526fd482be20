"""The real engine: exact log-probabilities, exact version stamps, swaps in flight, and law 3 (proven weights only).

One vLLM engine serves most of the file, in the order of the tests; law 3 ends its life.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest

from rlsys.errors import EngineLost, RequestRefused, WeightsRefused
from rlsys.records import StopReason, Turn
from rlsys.rollout.engine import GenerateRequest
from tests.engine_contract import check_engine_contract
from tests.integration.serving import (
    COMING_UP_VARIABLE,
    END,
    ENDING_STEP,
    NEVER_PREPARE,
    PROMPT,
    VOCAB,
    Bench,
    WallClock,
    difference_of,
    running,
    serving_folder,
    settings_of,
)

pytestmark = pytest.mark.engines

NUM_LONG = 560  # tokens of a request that lives through a swap


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    with serving_folder(tmp_path_factory.mktemp("engine")) as folder:
        yield folder


@pytest.fixture(scope="module")
def bench(folder) -> Iterator[Bench]:
    with running("rollout-0", folder, timeout_s=120) as bench:
        yield bench


def _request(name: str, max_tokens: int = 32, *, temperature: float = 1.0, seed: int = 3) -> GenerateRequest:
    return GenerateRequest(request_id=name, token_ids=PROMPT, max_tokens=max_tokens, temperature=temperature, seed=seed)


def test_vllm_engine_obeys_the_contract_and_stamps_every_token_with_what_sampled_it(bench):
    first, second = bench.weights(1), bench.weights(2, previous=1)
    turn = bench.run(
        check_engine_contract(
            bench.engine,
            first=first,
            second=second,
            refused=replace(bench.weights(3), segment=str(bench.folder / "gone")),
            request=_request("contract", NUM_LONG),
            clock=WallClock(),
        )
    )
    is_first = turn.versions_T == first.version.code
    assert difference_of(turn, 1)[is_first].max() < 1e-3
    assert difference_of(turn, 2)[~is_first].max() < 1e-3
    assert difference_of(turn, 1)[~is_first].mean() > 0.1  # the two are far enough apart for the test to mean something


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(bench, temperature):
    turn = bench.run(bench.engine.generate(_request("exact", 64, temperature=temperature)))
    assert len(turn.token_ids_T) == 64 and turn.stop_reason is StopReason.LENGTH
    assert difference_of(turn, 2, temperature).max() < 1e-4
    if temperature != 1.0:
        assert difference_of(turn, 2, 1.0).max() > 0.1


def test_an_answer_ends_with_the_end_token_and_says_so(bench):
    bench.run(bench.engine.load_weights(bench.weights(ENDING_STEP, previous=2)))
    turns = bench.run(_gather([bench.engine.generate(_request(f"e{seed}", 200, seed=seed)) for seed in range(8)]))
    for turn in turns:
        assert turn.stop_reason is StopReason.EOS
        assert turn.token_ids_T[-1] == END and END not in turn.token_ids_T[:-1]
    assert max(len(turn.token_ids_T) for turn in turns) > 1


def test_a_swap_with_more_context_in_flight_than_fits_into_a_batch_keeps_every_token_exact(bench):
    """64 requests at some 60 tokens each are prefilled again: more than vLLM's batch of 2048 tokens."""

    async def play(length: int) -> list[Turn]:
        requests = (_request(f"load{length}-{seed}", length, seed=seed) for seed in range(64))
        return await _gather([bench.engine.generate(request) for request in requests])

    async def swap_under_load() -> list[Turn]:
        await bench.engine.load_weights(bench.weights(1, previous=ENDING_STEP))
        second = bench.weights(2, previous=1)
        started = perf_counter()
        await play(60)
        seconds = perf_counter() - started
        in_flight = asyncio.create_task(play(360))  # long enough that none ends before the swap
        await asyncio.sleep(seconds)
        await bench.engine.load_weights(second)
        return await in_flight

    turns = bench.run(swap_under_load())
    in_flight_tokens = [np.count_nonzero(turn.versions_T == 1) for turn in turns]
    assert sum(in_flight_tokens) + len(PROMPT) * len(turns) > 2048
    assert min(in_flight_tokens) > 0 and max(in_flight_tokens) < 360
    for turn in turns:
        is_first = turn.versions_T == 1
        assert difference_of(turn, 1)[is_first].max() < 1e-3
        assert difference_of(turn, 2)[~is_first].max() < 1e-3


def test_a_request_whose_caller_gives_up_leaves_the_engine_and_takes_nobody_along(bench):
    async def scenario():
        await bench.engine.load_weights(bench.weights(1))
        given_up = [asyncio.create_task(bench.engine.generate(_request(f"up-{n}", max_tokens=600))) for n in range(8)]
        kept = asyncio.create_task(bench.engine.generate(_request("kept", max_tokens=200)))
        await asyncio.sleep(0.2)
        for task in given_up:
            task.cancel()
        results = await asyncio.gather(*given_up, return_exceptions=True)
        unfinished = bench.engine._process.alive().output_processor.get_num_unfinished_requests()
        return results, unfinished, await kept

    results, unfinished, kept = bench.run(scenario())
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert unfinished == 1
    assert len(kept.token_ids_T) == 200 and difference_of(kept, 1).max() < 1e-4


def test_a_prompt_beyond_the_context_is_refused_and_the_engine_goes_on(bench):
    too_long = replace(_request("long"), token_ids=[5] * 1000)
    with pytest.raises(RequestRefused, match="rollout-0"):
        bench.run(bench.engine.generate(too_long))
    with pytest.raises(RequestRefused):
        bench.run(bench.engine.generate(replace(_request("alien"), token_ids=[VOCAB + 44])))
    assert len(bench.run(bench.engine.generate(_request("fine", 4))).token_ids_T) > 0


def test_a_corrupted_byte_is_refused_by_name_and_the_old_version_is_served_on(bench):
    served = bench.engine.version
    weights = bench.weights(3)
    entry = next(entry for entry in weights.tensors if entry.name == "model.layers.1.mlp.down_proj.weight")
    data = bytearray(Path(weights.segment).read_bytes())
    data[entry.offset + entry.num_bytes - 1] ^= 1
    Path(weights.segment).write_bytes(data)
    with pytest.raises(WeightsRefused, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        bench.run(bench.engine.load_weights(weights))
    assert bench.engine.version == served
    turn = bench.run(bench.engine.generate(_request("after", 4)))
    assert set(turn.versions_T) == {served.code}


@pytest.mark.parametrize("is_prepared", [True, False])
def test_weights_are_exact_whether_packed_beside_the_running_model_or_in_the_pause(bench, is_prepared):
    """In flight a swap of either kind; the request's tokens are those of the versions that they are stamped with."""
    marker = bench.folder / NEVER_PREPARE
    if not is_prepared:
        marker.touch()
    first, second = bench.weights(1), bench.weights(2, previous=1)

    async def swap() -> Turn:
        await bench.engine.load_weights(first)
        in_flight = asyncio.create_task(bench.engine.generate(_request("in-flight", 400)))
        await asyncio.sleep(0.2)
        await bench.engine.load_weights(second)
        return await in_flight

    before = bench.ask("num_exchanges")
    turn = bench.run(swap())
    marker.unlink(missing_ok=True)
    assert [after - one for after, one in zip(bench.ask("num_exchanges"), before, strict=True)] == [2 * is_prepared]
    assert set(turn.versions_T) == {first.version.code, second.version.code}
    for step, weights in ((1, first), (2, second)):
        assert difference_of(turn, step)[turn.versions_T == weights.version.code].max() < 1e-3


def test_old_weights_are_given_back(bench):
    """As many packed matrices after many versions as after one."""

    def num_packed_after(step: int) -> int:
        bench.run(bench.engine.load_weights(bench.weights(step)))
        return poll(lambda: bench.ask("num_packed")[0], lambda num: num == before)

    before = bench.ask("num_packed")[0]
    assert before > 0
    assert [num_packed_after(step) for step in (1, 2, 3, 4)] == [before] * 4


def test_a_version_that_cannot_be_prepared_is_refused_and_the_old_one_is_served_on(bench):
    served = bench.engine.version
    weights = bench.weights(3)
    entry, *others = weights.tensors
    with pytest.raises(WeightsRefused, match="rollout-0, version 0.3"):
        bench.run(bench.engine.load_weights(replace(weights, tensors=(entry._replace(name="alien"), *others))))
    assert bench.engine.version == served
    assert set(bench.run(bench.engine.generate(_request("served", 4))).versions_T) == {served.code}
    bench.run(bench.engine.load_weights(weights))
    turn = bench.run(bench.engine.generate(_request("whole", 32)))
    assert difference_of(turn, 3).max() < 1e-3


def test_a_tied_head_that_was_not_packed_again_is_caught_and_the_engine_serves_nothing_more(bench):
    good, bad = bench.weights(4), bench.weights(5, previous=4)

    async def swap_badly() -> list[Turn | BaseException]:
        await bench.engine.load_weights(good)
        bench.marker.touch()
        # lengths so that some end before the swap, some while it is proven, and some would run on
        lengths = [1, 40, 80, 120, 160, 200, 240, 280, 320, NUM_LONG]
        requests = [_request(f"s{length}", length) for length in lengths]
        in_flight = asyncio.gather(*map(bench.engine.generate, requests), return_exceptions=True)
        await asyncio.sleep(0.1)
        with pytest.raises(WeightsRefused, match="differ from the learner's"):
            await bench.engine.load_weights(bad)
        return await asyncio.wait_for(in_flight, 10)

    outcomes = bench.run(swap_badly())
    assert isinstance(outcomes[-1], EngineLost) and "failed its proof" in str(outcomes[-1])
    turns = [outcome for outcome in outcomes if isinstance(outcome, Turn)]
    assert len(turns) + sum(isinstance(outcome, EngineLost) for outcome in outcomes) == len(outcomes)
    assert {code for turn in turns for code in turn.versions_T} <= {good.version.code}
    assert bench.engine.version == good.version
    with pytest.raises(EngineLost, match="rollout-0"):
        bench.run(bench.engine.generate(_request("late", 4)))
    bench.marker.unlink()
    with pytest.raises(EngineLost):
        bench.run(bench.engine.load_weights(bench.weights(6)))


def test_an_engine_that_hangs_is_lost_within_the_deadline(folder):
    others = multiprocessing.active_children()
    with running("rollout-1", folder, timeout_s=2) as bench:
        (process,) = [child for child in multiprocessing.active_children() if child not in others]
        bench.run(bench.engine.load_weights(bench.weights(1)))

        async def hang() -> list[BaseException]:
            in_flight = asyncio.gather(
                *(bench.engine.generate(_request(f"h{seed}", NUM_LONG, seed=seed)) for seed in range(3)),
                return_exceptions=True,
            )
            await asyncio.sleep(0.1)
            os.kill(process.pid, signal.SIGSTOP)
            return await asyncio.wait_for(in_flight, 10)

        assert all("waited 2 s for request h0 on engine rollout-1" in str(outcome) for outcome in bench.run(hang()))
        with pytest.raises(EngineLost, match="rollout-1"):
            bench.run(bench.engine.load_weights(bench.weights(2)))
    process.join(5)
    assert not process.is_alive()


def poll(ask: Callable[[], int], is_wanted: Callable[[int], bool], seconds: float = 10) -> int:
    """The first answer that is wanted, or the last one before the deadline."""
    deadline = perf_counter() + seconds
    while not is_wanted(answer := ask()) and perf_counter() < deadline:
        sleep(0.05)
    return answer


async def _gather(coroutines: list[Coroutine[Any, Any, Turn]]) -> list[Turn]:
    return await asyncio.gather(*coroutines)


def _start_slowly(folder: Path) -> None:
    from rlsys.rollout.vllm_engine import VllmEngine

    worker = "tests.integration.slow_worker.WorkerExtension"
    asyncio.run(VllmEngine("slow", settings_of(folder, timeout_s=60, worker_extension=worker)).start())


def test_an_engine_whose_driver_is_killed_while_it_starts_is_not_left_behind(folder, tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"
    monkeypatch.setenv(COMING_UP_VARIABLE, str(pid_file))
    driver = multiprocessing.get_context("spawn").Process(target=_start_slowly, args=(folder,))
    driver.start()
    try:
        poll(lambda: pid_file.exists() or not driver.is_alive(), bool, seconds=60)
        worker = int(pid_file.read_text())
        assert _is_at_work(worker)
    finally:
        driver.kill()
        driver.join()
    assert poll(lambda: not _is_at_work(worker), bool, seconds=30)  # it would take a minute to end by itself


def _is_at_work(pid: int) -> bool:
    """Neither gone nor ended, with nobody there to take notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
