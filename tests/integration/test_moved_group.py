"""Over Ray: an engine that has to go hands out what it plays, and another one ends it inside its group."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from rlsys.actors.clock import WallClock
from rlsys.actors.cluster import ray_cluster
from rlsys.actors.rollout import RayFleet, RolloutActor, Worker
from rlsys.bench.weight_sync_engines import _probe
from rlsys.config.schema import RaySection
from rlsys.controller.gather import Gatherer
from rlsys.controller.roster import Roster
from rlsys.records import Draw, Prompt, RolloutGroup, Version, WeightVersion
from rlsys.rollout.play import PlaySpec
from rlsys.rollout.vllm_settings import VllmSettings, engine_environment
from rlsys.train.export import FullWeights
from rlsys.weights.channel import SharedMemory
from rlsys.weights.segment import SegmentWriter, remove_segments, segment_path

pytestmark = pytest.mark.engines

RUN, ENGINES = "test-moved-group", ("rollout-0", "rollout-1")
SPEC = PlaySpec(group_size=16, temperature=1.0, max_tokens=400, seed=5)
PROMPT = Prompt(draw=Draw(source="moved", index=0, epoch=0), content="12+34=")


@contextmanager
def published(model: Any) -> Iterator[WeightVersion]:
    path = segment_path(RUN, "0")
    writer = SegmentWriter(path, torch.float32)
    for bucket in FullWeights(model, deepspeed=torch, zero_stage=0):
        writer.write(bucket)
    version = Version(incarnation=0, step=3)
    tensors = writer.finish()
    try:
        yield WeightVersion(
            version=version, segment=str(path), tensors=tensors, probe=_probe(model), previous_probe=None
        )
    finally:
        remove_segments(RUN)


def actor_of(name: str, folder: Path) -> Any:
    settings = VllmSettings(
        model=str(folder),
        dtype="float32",
        max_model_len=512,
        slots=32,
        seed=0,
        start_timeout_s=300,
        timeout_s=120,
    )
    environment = {"env_vars": engine_environment(cpus=1, gpus=0)}
    actor = ray.remote(RolloutActor).options(num_cpus=0, max_concurrency=64, runtime_env=environment)
    return actor.remote(name, settings)


async def lose_none(engine: str, reason: str) -> None:
    raise AssertionError(f"{engine} is lost: {reason}")


async def move_a_group(folder: Path, weights: WeightVersion) -> tuple[Gatherer, RolloutGroup]:
    """It begins on the first engine; the second one comes when that one has to go."""
    fleet, roster = RayFleet(), Roster(ENGINES[:1], slots=32, clock=WallClock())
    actors = {name: actor_of(name, folder) for name in ENGINES}
    await asyncio.gather(*(actor.start.remote() for actor in actors.values()))
    for name, actor in actors.items():
        fleet.admit(name, Worker(actor=actor, place=None, channel=SharedMemory()))  # type: ignore[arg-type]
        await fleet.load(name, weights)
    gatherer = Gatherer(fleet, roster, lose=lose_none, sampled=lambda rollout: None, timeout_s=120, max_retries=0)
    roster.serve(ENGINES[0], weights.version.step)
    playing = asyncio.create_task(gatherer.play(PROMPT, SPEC, ages=True))
    await asyncio.sleep(0.7)
    roster.remove(ENGINES[0])
    await asyncio.wait_for(fleet.interrupt(ENGINES[0]), 60)
    roster.add(ENGINES[1])
    roster.serve(ENGINES[1], weights.version.step)
    group = await playing
    await fleet.stop()
    return gatherer, group


def test_an_engine_that_has_to_go_hands_its_rollouts_over_inside_their_group(model):
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with published(reference) as weights, ray_cluster(RaySection(address="local", dashboard=False), RUN):
        gatherer, group = asyncio.run(move_a_group(model, weights))
    assert len(group.rollouts) == SPEC.group_size and group.dropped == ()
    moved = [rollout for rollout in group.rollouts if rollout.engine == ENGINES[1]]
    assert len(moved) == gatherer.num_moved > 0 and gatherer.num_retried == 0
    for rollout in group.rollouts:
        token_ids_T = torch.from_numpy(rollout.token_ids_T).long()
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(reference(token_ids_T[None]).logits[0, :-1], -1)
        wanted_T = logprobs_TV.gather(-1, token_ids_T[1:, None])[:, 0].numpy()
        assert np.abs(rollout.behaviour_logprobs_T[1:] - wanted_T)[rollout.loss_mask_T[1:]].max() < 1e-3
        assert rollout.num_sampled_tokens <= SPEC.max_tokens
