"""Weights that change while requests are in flight, on the real engine: every token is that of the version that it is
stamped with, and no request is lost, doubled or cut."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rlsys.records import LoadReport, Turn, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from tests.integration.serving import END, PROMPT, Bench, logprobs_of, model_of, running, serving_folder

pytestmark = pytest.mark.engines

STEPS = (1, 2, 3, 4)  # versions; their log-probabilities differ by some tenths on average
NUM_LONG = 900  # tokens, some seconds of work: more than all swaps take, also on a loaded machine
NUM_UPDATES = 200
IN_FLIGHT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with serving_folder(tmp_path_factory.mktemp("inflight")) as folder:
        yield folder


def request_of(name: str, max_tokens: int, seed: int = 3) -> GenerateRequest:
    return GenerateRequest(request_id=name, token_ids=PROMPT, max_tokens=max_tokens, temperature=1.0, seed=seed)


def difference(turn: Turn, step: int) -> np.ndarray:
    """Absolute difference to transformers under the model of ``step``, per sampled token, nats."""
    reference = logprobs_of(model_of(step), PROMPT + turn.token_ids_T.tolist())[len(PROMPT) :]
    return np.abs(turn.behaviour_logprobs_T - reference)


def weights_of_steps(bench: Bench) -> list[WeightVersion]:
    first, *others = STEPS
    return [bench.weights(first), *(bench.weights(step, previous=before) for before, step in pairwise(STEPS))]


async def generate_through_updates(bench: Bench, gap_s: float) -> tuple[Turn, list[LoadReport]]:
    """One long request, and every version but the first loaded while it runs."""
    first, *others = weights_of_steps(bench)
    await bench.engine.load_weights(first)
    running_request = asyncio.create_task(bench.engine.generate(request_of("long", NUM_LONG)))
    reports = []
    for weights in others:
        await asyncio.sleep(gap_s)
        reports.append(await bench.engine.load_weights(weights))
    return await running_request, reports


def test_recomputed_each_token_is_that_of_its_stamped_version_and_of_no_other(folder):
    with running("recompute", folder, timeout_s=120, update_mode="recompute") as bench:
        turn, _ = bench.run(generate_through_updates(bench, 0.1))
    assert len(turn.token_ids_T) == NUM_LONG
    assert (np.diff(turn.versions_T) >= 0).all() and list(np.unique(turn.versions_T)) == list(STEPS)
    for step in STEPS:
        own = turn.versions_T == step
        assert difference(turn, step)[own].max() < 1e-3
        for neighbour in {step - 1, step + 1} & set(STEPS):
            assert difference(turn, neighbour)[own].mean() > 1e-1


def test_kept_spans_are_exact_and_the_deviation_is_measured(folder, record_property):
    with running("keep", folder, timeout_s=120, update_mode="keep") as bench:
        turn, _ = bench.run(generate_through_updates(bench, 0.1))
    assert len(turn.token_ids_T) == NUM_LONG
    assert (np.diff(turn.versions_T) >= 0).all() and list(np.unique(turn.versions_T)) == list(STEPS)
    first = turn.versions_T == STEPS[0]
    assert difference(turn, STEPS[0])[first].max() < 1e-3  # nothing was old yet
    deviation = np.concatenate([difference(turn, step)[turn.versions_T == step] for step in STEPS[1:]])
    record_property("keep_deviation_mean_nats", float(deviation.mean()))
    record_property("keep_deviation_max_nats", float(deviation.max()))
    print(f"update_mode keep: deviation {deviation.mean():.3g} on average, {deviation.max():.3g} at most, nats a token")
    assert deviation.mean() > 1e-3  # of neither model: what the mode costs


def test_drained_requests_end_under_the_version_that_began_them(folder):
    async def drain(bench: Bench) -> tuple[Turn, Turn, LoadReport]:
        first, second, *_ = weights_of_steps(bench)
        await bench.engine.load_weights(first)
        before = asyncio.create_task(bench.engine.generate(request_of("before", NUM_LONG)))
        await asyncio.sleep(0.4)
        load = asyncio.create_task(bench.engine.load_weights(second))
        await asyncio.sleep(0.2)
        assert not load.done()  # it waits for the request
        after = asyncio.create_task(bench.engine.generate(request_of("after", 32)))
        return await before, await after, await load

    with running("drain", folder, timeout_s=120, update_mode="drain") as bench:
        before, after, report = bench.run(drain(bench))
    for turn, step in ((before, 1), (after, 2)):
        assert set(turn.versions_T) == {step}
        assert difference(turn, step).max() < 1e-3
    assert len(before.token_ids_T) == NUM_LONG and report.pause_s < report.total_s


def test_no_request_is_lost_doubled_or_cut_over_many_updates(folder):
    """New requests come all the time, and updates too: while requests are parked, sent, running, returning."""

    async def serve(bench: Bench) -> list[tuple[int, Turn]]:
        one, other = bench.weights(1), bench.weights(2, previous=1)
        one = replace(one, previous_probe=other.probe)
        await bench.engine.load_weights(replace(one, version=Version(incarnation=0, step=0), previous_probe=None))
        is_over, done, numbers = asyncio.Event(), [], iter(range(1 << 30))

        async def client() -> None:
            while not is_over.is_set():
                number = next(numbers)
                length = 1 + 37 * number % 90
                turn = await bench.engine.generate(request_of(f"r{number}", length, seed=number))
                done.append((number, turn))

        clients = [asyncio.create_task(client()) for _ in range(IN_FLIGHT)]
        for update in range(NUM_UPDATES):
            weights = replace(one if update % 2 else other, version=Version(incarnation=0, step=update + 1))
            await bench.engine.load_weights(weights)
        is_over.set()
        await asyncio.gather(*clients)
        return done

    with running("updates", folder, timeout_s=120) as bench:
        done = bench.run(serve(bench))
    numbers = [number for number, _ in done]
    assert sorted(numbers) == list(range(len(numbers))) and len(numbers) > NUM_UPDATES
    for number, turn in done:
        is_ended = turn.token_ids_T[-1] == END  # by itself: the least likely token, but of thousands one may be it
        assert len(turn.token_ids_T) == 1 + 37 * number % 90 or is_ended
        assert END not in turn.token_ids_T[:-1]
        assert (np.diff(turn.versions_T) >= 0).all()
    crossing = [(number, turn) for number, turn in done if len(np.unique(turn.versions_T)) > 1]
    assert len(crossing) > IN_FLIGHT
    for _, turn in crossing[:: max(1, len(crossing) // 20)]:  # odd steps carry the second model, even ones the first
        for parity, step in ((1, 2), (0, 1)):
            own = turn.versions_T % 2 == parity
            assert not own.any() or difference(turn, step)[own].max() < 1e-3
