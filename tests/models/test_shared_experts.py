"""An engine takes its weights from learner ranks that share the experts of a model, each of them some."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from rlsys.records import LoadReport, Probe, Turn, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.vllm_settings import VllmSettings, engine_environment
from rlsys.weights.probe import probe_sequences
from rlsys.weights.segment import SegmentWriter, segment_path
from tests.laws.learner_ranks import Outcome, Ranks, make_groups, section
from tests.laws.test_gradient import OLDEST_STEP, VERSION, packed, reference_logprobs
from tests.models.tiny_architectures import ARCHITECTURES, VOCAB_SIZE, make_folder

pytestmark = pytest.mark.engines

ENGINE_AND_LEARNER = 1e-4  # nats, float32
MOVED = 1e-2  # nats
PROBES = probe_sequences(VOCAB_SIZE, seed=0)
PROMPT = [17, 4, 99, 230, 8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Folders of the model before and after one step of two ranks, and what rank 0 reports of it."""

    before: Path
    after: Path
    outcome: Outcome


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("experts")
    make_folder(ARCHITECTURES["qwen3_experts"], folder / "before")
    samples = build(make_groups(VERSION), advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0)
    ranks = Ranks(2)
    try:
        outcome, _ = ranks.run(
            2,
            packed(samples, 2, 64),
            model_path=str(folder / "before"),
            train=section(2, 2, expert_parallel=2, router_aux_coef=0.1, lr=4.0),
            probe=PROBES,
            save_to=str(folder / "after"),
        )
    finally:
        ranks.stop()
    yield Trained(before=folder / "before", after=folder / "after", outcome=outcome)


def plain_logprobs(folder: Path, token_ids: np.ndarray) -> np.ndarray:
    """float32 [T], 0 at the first token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return np.append(0.0, reference_logprobs(model, torch.tensor(token_ids).long(), 1.0).numpy()).astype(np.float32)


def written(step: int, weights: dict[str, np.ndarray], probe: Probe, previous: Probe | None) -> WeightVersion:
    path = segment_path("shared-experts", str(step))
    writer = SegmentWriter(path, torch.float32)
    writer.write({name: torch.from_numpy(array) for name, array in weights.items()})
    return WeightVersion(
        version=Version(incarnation=0, step=step),
        segment=str(path),
        tensors=writer.finish(),
        probe=probe,
        previous_probe=previous,
    )


async def served(folder: Path, versions: list[WeightVersion]) -> tuple[list[LoadReport], Turn]:
    """Load one version after the other, then generate."""
    from rlsys.rollout.vllm_engine import VllmEngine  # reads the environment when it is imported

    settings = VllmSettings(
        model=str(folder), dtype="float32", max_model_len=128, slots=8, seed=0, start_timeout_s=240, timeout_s=60
    )
    engine = VllmEngine("rollout-0", settings)
    try:
        await engine.start()
        loads = [await engine.load_weights(version) for version in versions]
        request = GenerateRequest(request_id="one", token_ids=PROMPT, max_tokens=32, temperature=1.0, seed=3)
        return loads, await engine.generate(request)
    finally:
        await engine.stop()


def test_an_engine_serves_what_ranks_with_some_experts_each_have_trained(trained, monkeypatch):
    outcome = trained.outcome
    for name, before in outcome.before.items():
        assert ".experts." not in name or not np.array_equal(outcome.after[name], before), name  # of either rank
    first = Probe(token_ids=PROBES, logprobs=tuple(plain_logprobs(trained.before, ids) for ids in PROBES))
    second = Probe(token_ids=PROBES, logprobs=tuple(outcome.probe))
    gaps = [np.abs(one - other)[1:].mean() for one, other in zip(first.logprobs, second.logprobs, strict=True)]
    assert np.mean(gaps) > MOVED
    for name, value in engine_environment(cpus=1, gpus=0).items():
        monkeypatch.setenv(name, value)
    versions = [written(0, outcome.before, first, None), written(1, outcome.after, second, first)]
    try:
        loads, turn = asyncio.run(served(trained.before, versions))
    finally:
        for version in versions:
            Path(version.segment).unlink()
    assert max(load.probe_difference for load in loads) < ENGINE_AND_LEARNER
    whole = np.array([*PROMPT, *turn.token_ids_T])
    sampled = slice(len(PROMPT), None)
    np.testing.assert_allclose(
        turn.behaviour_logprobs_T, plain_logprobs(trained.after, whole)[sampled], atol=ENGINE_AND_LEARNER
    )
    assert np.abs(turn.behaviour_logprobs_T - plain_logprobs(trained.before, whole)[sampled]).max() > MOVED
