"""An engine of two processes that share the model: versions arrive in both, proven, while requests are in flight."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rlsys.records import Turn
from rlsys.rollout.engine import GenerateRequest
from tests.integration.serving import PROMPT, Bench, logprobs_of, model_of, running, serving_folder

pytestmark = pytest.mark.engines

NUM_TOKENS = 300


def difference(turn: Turn, step: int) -> np.ndarray:
    reference = logprobs_of(model_of(step), PROMPT + turn.token_ids_T.tolist())[len(PROMPT) :]
    return np.abs(turn.behaviour_logprobs_T - reference)


async def generate_through_an_update(bench: Bench) -> Turn:
    await bench.engine.load_weights(bench.weights(1))
    request = GenerateRequest(request_id="r", token_ids=PROMPT, max_tokens=NUM_TOKENS, temperature=1.0, seed=3)
    in_flight = asyncio.create_task(bench.engine.generate(request))
    await asyncio.sleep(0.3)
    await bench.engine.load_weights(bench.weights(2, previous=1))
    return await in_flight


def test_a_tensor_parallel_engine_takes_versions_over_in_every_process(tmp_path):
    with (
        serving_folder(tmp_path) as folder,
        running("rollout-0", folder, timeout_s=120, vllm={"tensor_parallel_size": 2}) as bench,
    ):
        turn = bench.run(generate_through_an_update(bench))
        assert bench.ask("num_exchanges") == [2, 2]  # of each process
    assert len(turn.token_ids_T) == NUM_TOKENS and set(turn.versions_T) == {1, 2}
    for step in (1, 2):
        own = turn.versions_T == step
        assert difference(turn, step)[own].max() < 1e-3
        assert difference(turn, 3 - step)[own].mean() > 1e-1
