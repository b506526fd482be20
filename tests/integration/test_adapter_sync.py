"""Adapters on the real engine, as the real learner publishes them: the engine loads the base once, a version is the
adapter alone, and every token is that of the adapter that it is stamped with."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.errors import WeightsRefused
from rlsys.records import Probe, Turn, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.vllm_settings import LORA_RANKS, AdapterRoom
from rlsys.train.learner import LearnerRank
from rlsys.weights.probe import probe_sequences
from rlsys.weights.segment import SegmentWriter
from rlsys.weights.tcp import SegmentServer, mirror
from tests.integration.serving import PROMPT, VOCAB, Bench, logprobs_of, model_of, running, serving_folder
from tests.laws.learner_ranks import OBJECTIVE, make_groups, section

pytestmark = pytest.mark.engines

LORA = {"r": 4, "lora_alpha": 12, "rank_pattern": {"q_proj": 6}, "init_lora_weights": True}
ROOM = AdapterRoom(rank=6, modules=("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"))
NUM_LONG = 500  # tokens, some seconds of work
STEPS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A version, and all weights with its adapter merged, as transformers takes them."""

    weights: WeightVersion
    merged: dict[str, torch.Tensor]


def published(learner: LearnerRank, step: int, folder: Path, previous: Probe | None) -> Published:
    path = folder / f"adapter-{step}"
    writer, merged = SegmentWriter(path, torch.float32), dict[str, torch.Tensor]()
    learner.export(writer.write, adapters_only=True)
    learner.export(lambda bucket: merged.update({name: tensor.clone() for name, tensor in bucket.items()}))
    token_ids = probe_sequences(VOCAB, seed=1)
    probe = Probe(token_ids=token_ids, logprobs=tuple(learner.probe_logprobs(token_ids)))
    weights = WeightVersion(
        version=Version(incarnation=0, step=step),
        segment=str(path),
        tensors=writer.finish(),
        probe=probe,
        previous_probe=previous,
    )
    return Published(weights=weights, merged=merged)


@pytest.fixture(scope="module")
def versions(folder) -> list[Published]:
    """Before the training, and after each of two batches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    train = section(0, 1, lr=4.0, lora=LORA)
    learner = LearnerRank(
        model_path=str(folder / "model"), train=train, temperature=1.0, objective=OBJECTIVE, seed=0, threads=1
    )
    learner.start(0, 1, "127.0.0.1", port)
    found = [published(learner, 0, folder, None)]
    for step in STEPS[1:]:
        version = Version(incarnation=0, step=step - 1)
        samples = build(make_groups(version), advantage=grpo, oldest_step=None, correct_at=1.0)
        batch = pack(samples, ranks=1, steps_per_batch=1, tokens_per_microbatch=512, pad_token_id=3, version=version)
        learner.step(batch.for_rank(0))
        found.append(published(learner, step, folder, found[-1].weights.probe))
    learner.stop()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    with serving_folder(tmp_path_factory.mktemp("adapters")) as folder:
        yield folder


@pytest.fixture(scope="module")
def bench(folder, versions) -> Iterator[Bench]:
    with running("rollout-0", folder, timeout_s=120, adapter=ROOM) as bench:
        yield bench


def request_of(name: str, max_tokens: int, prompt: list[int] = PROMPT) -> GenerateRequest:
    return GenerateRequest(request_id=name, token_ids=prompt, max_tokens=max_tokens, temperature=1.0, seed=3)


def difference(turn: Turn, of: Published, prompt: list[int] = PROMPT) -> np.ndarray:
    """Absolute difference to transformers under the merged weights, per sampled token, nats."""
    model = model_of(0)
    model.load_state_dict(of.merged, strict=False)  # without the second name of the tied head
    reference = logprobs_of(model, prompt + turn.token_ids_T.tolist())[len(prompt) :]
    return np.abs(turn.behaviour_logprobs_T - reference)


def test_vllm_has_room_for_the_ranks_that_we_round_to():
    from vllm.config.lora import MaxLoRARanks  # reads the environment when it is imported

    assert get_args(MaxLoRARanks) == LORA_RANKS


def test_a_version_is_the_adapter_and_nothing_else(versions):
    """Two layers of 64 wide, 128 inside, one key-value head of 32: every matrix in float32."""
    in_and_out = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 128), "up": (64, 128)}
    in_and_out["down"] = (128, 64)
    elements = sum((6 if name == "q" else 4) * (ins + outs) for name, (ins, outs) in in_and_out.items())
    for own in versions:
        names = [entry.name for entry in own.weights.tensors]
        assert all(".lora_A." in name or ".lora_B." in name for name in names) and len(set(names)) == 2 * 7 * 2
        assert sum(entry.num_bytes for entry in own.weights.tensors) == 2 * elements * 4


def test_each_token_is_that_of_the_adapter_it_is_stamped_with_and_of_no_other(bench, versions):
    """The first version is the base itself; the last comes from another machine."""
    server = SegmentServer("127.0.0.1", [versions[2].weights.segment])
    last = mirror(versions[2].weights, server.source, bench.folder / "mirrored")
    server.close()

    async def generate() -> Turn:
        await bench.engine.load_weights(versions[0].weights)
        in_flight = asyncio.create_task(bench.engine.generate(request_of("long", NUM_LONG)))
        for weights in (versions[1].weights, last):
            await asyncio.sleep(0.4)
            report = await bench.engine.load_weights(weights)
            assert report.probe_difference < 1e-4
        return await in_flight

    turn = bench.run(generate())
    assert (np.diff(turn.versions_T) >= 0).all() and list(np.unique(turn.versions_T)) == list(STEPS)
    for step in STEPS:
        own = turn.versions_T == step
        assert difference(turn, versions[step])[own].max() < 1e-3
        for neighbour in {step - 1, step + 1} & set(STEPS):
            assert difference(turn, versions[neighbour])[own].mean() > 1e-2


def test_kept_spans_are_exact_and_the_first_adapter_is_the_stamped_one(folder, versions, record_property):
    """Several requests, because some end by themselves before the last version."""

    async def generate(bench: Bench) -> list[Turn]:
        await bench.engine.load_weights(versions[0].weights)
        requests = [replace(request_of(f"long-{seed}", NUM_LONG), seed=seed) for seed in range(8)]
        in_flight = [asyncio.create_task(bench.engine.generate(request)) for request in requests]
        for own in versions[1:]:
            await asyncio.sleep(0.4)
            await bench.engine.load_weights(own.weights)
        return await asyncio.gather(*in_flight)

    with running("keep", folder, timeout_s=120, adapter=ROOM, update_mode="keep") as bench:
        turns = bench.run(generate(bench))
    deviations = []
    for turn in turns:
        assert (np.diff(turn.versions_T) >= 0).all()
        assert difference(turn, versions[0])[turn.versions_T == 0].max() < 1e-3  # nothing was old yet
        deviations += [difference(turn, versions[step])[turn.versions_T == step] for step in STEPS[1:]]
    assert list(np.unique(np.concatenate([turn.versions_T for turn in turns]))) == list(STEPS)
    deviation = float(np.concatenate(deviations).mean())
    record_property("keep_deviation_mean_nats", deviation)
    assert deviation > 1e-3  # of neither adapter: what the mode costs


def test_drained_requests_end_under_the_adapter_that_began_them(folder, versions):
    async def drain(bench: Bench) -> tuple[Turn, Turn]:
        await bench.engine.load_weights(versions[1].weights)
        before = asyncio.create_task(bench.engine.generate(request_of("before", NUM_LONG)))
        await asyncio.sleep(0.4)
        load = asyncio.create_task(bench.engine.load_weights(versions[2].weights))
        await asyncio.sleep(0.2)
        assert not load.done()  # it waits for the request
        after = asyncio.create_task(bench.engine.generate(request_of("after", 32)))
        await load
        return await before, await after

    with running("drain", folder, timeout_s=120, adapter=ROOM, update_mode="drain") as bench:
        before, after = bench.run(drain(bench))
    for turn, own, other in ((before, 1, 2), (after, 2, 1)):
        assert set(turn.versions_T) == {own}
        assert difference(turn, versions[own]).max() < 1e-3
        assert difference(turn, versions[other]).mean() > 1e-2


def test_a_cached_prefix_is_never_of_another_adapter(bench, versions):
    """Twice under each version: the second time from the cache, which holds blocks of 128 tokens."""
    prompt = np.random.default_rng(0).integers(1, VOCAB, 300).tolist()
    for step in (1, 2, 1):
        bench.run(bench.engine.load_weights(versions[step].weights))
        for number in range(2):
            turn = bench.run(bench.engine.generate(request_of(f"prefix-{step}-{number}", 16, prompt)))
            assert set(turn.versions_T) == {step}
            assert difference(turn, versions[step], prompt).max() < 1e-3


def test_an_adapter_that_the_engine_cannot_serve_is_refused_and_the_old_one_is_served_on(bench, versions, tmp_path):
    served, weights = bench.engine.version, versions[2].weights
    entry, *others = weights.tensors
    alien = entry._replace(name=entry.name.replace("q_proj", "embed_tokens"))
    with pytest.raises(WeightsRefused, match=r"no layer for the adapter at model\.layers\.0\.self_attn\.embed_tokens"):
        bench.run(bench.engine.load_weights(replace(weights, tensors=(alien, *others))))
    writer = SegmentWriter(tmp_path / "large", torch.float32)
    writer.write({entry.name: torch.zeros(9, 64)})
    with pytest.raises(WeightsRefused, match="rank 9, the engine was started with room for 8"):
        bench.run(bench.engine.load_weights(replace(weights, segment=str(tmp_path / "large"), tensors=writer.finish())))
    assert bench.engine.version == served
    turn = bench.run(bench.engine.generate(request_of("after", 32)))
    assert set(turn.versions_T) == {served.code} and difference(turn, versions[served.step]).max() < 1e-3
