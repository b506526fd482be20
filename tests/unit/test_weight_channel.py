"""The ways of a version to an engine's machine obey one contract; which one is taken, and what is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import Mock

import pytest
import torch

from rlsys.actors.machines import RayMachines
from rlsys.actors.mirror import NodeMirror
from rlsys.actors.sender import Spot
from rlsys.config.load import load_config
from rlsys.config.schema import RolloutSection
from rlsys.errors import ConfigError, WeightsRefused
from rlsys.plan.references import check_references
from rlsys.records import Probe, Version, WeightVersion
from rlsys.weights.channel import (
    AUTO,
    IPC,
    NATIVE,
    NCCL,
    SHARDED_RDT,
    SHM,
    TCP,
    Channel,
    SharedMemory,
    channel_name,
    check_channel,
    check_reach,
)
from rlsys.weights.pool import NUM_SEGMENTS, SegmentPool
from rlsys.weights.segment import SegmentReader, SegmentWriter
from rlsys.weights.tcp import SegmentServer, mirror

NUM_VALUES = 5000


class Learner:
    """Its segments, recycled as those of a run are."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(folder / f"learner-{number}") for number in range(NUM_SEGMENTS)]
        self._writers = {path: SegmentWriter(path, torch.float32) for path in self.paths}
        self._pool = SegmentPool(self.paths)

    def publish(self, step: int) -> WeightVersion:
        segment = self._pool.acquire()
        assert segment is not None, "both segments are being read"
        self._writers[segment].write({"weight": torch.full((NUM_VALUES,), float(step))})
        tensors = self._writers[segment].finish()
        self._pool.publish(segment)
        probe = Probe(token_ids=(), logprobs=())
        version = Version(incarnation=0, step=step)
        return WeightVersion(version=version, segment=segment, tensors=tensors, probe=probe, previous_probe=None)

    @contextmanager
    def read(self, weights: WeightVersion) -> Iterator[None]:
        """As every pull protects the learner's segment."""
        self._pool.add_reader(weights.segment)
        yield
        self._pool.remove_reader(weights.segment)


@contextmanager
def shared_memory(learner: Learner, folder: Path) -> Iterator[Channel]:
    yield SharedMemory()


@contextmanager
def over_tcp(learner: Learner, folder: Path) -> Iterator[Channel]:
    """With the mirror of the other machine in this process."""

    async def bring(*arguments):
        return await asyncio.to_thread(mirror, *arguments)

    server = SegmentServer("127.0.0.1", learner.paths)
    actor = SimpleNamespace(mirror=SimpleNamespace(remote=bring))
    paths = [str(folder / f"mirror-{number}") for number in range(NUM_SEGMENTS)]
    try:
        yield NodeMirror("mirror", actor, paths, server.source)
    finally:
        server.close()


def check_holds(there: WeightVersion, weights: WeightVersion) -> None:
    assert there.version == weights.version and there.tensors == weights.tensors
    reader = SegmentReader(there.segment, there.tensors)
    reader.verify()
    ((name, values),) = reader.tensors()
    assert (name, set(values.tolist())) == ("weight", {float(weights.version.step)})


async def check_contract(channel: Channel, learner: Learner) -> None:
    one = learner.publish(1)
    with learner.read(one):
        async with channel.holding(one) as there, channel.holding(one) as for_another_engine:
            check_holds(there, one)
            assert for_another_engine.segment == there.segment  # one copy for all engines of a machine
            two = learner.publish(2)
            with learner.read(two):
                async with channel.holding(two) as newer:
                    check_holds(newer, two)
                    check_holds(there, one)
    for step in range(3, 8):  # what nobody holds is written over
        weights = learner.publish(step)
        with learner.read(weights):
            async with channel.holding(weights) as there:
                check_holds(there, weights)
    assert not channel.is_lost


@pytest.mark.parametrize("way", [shared_memory, over_tcp])
def test_every_channel_obeys_the_contract(way: Callable, tmp_path):
    learner = Learner(tmp_path)
    with way(learner, tmp_path) as channel:
        asyncio.run(check_contract(channel, learner))


def test_what_cannot_be_brought_is_refused_and_the_next_version_comes(tmp_path):
    async def scenario() -> None:
        one = learner.publish(1)
        (tmp_path / "learner-0").rename(tmp_path / "gone")
        with learner.read(one), pytest.raises(WeightsRefused):
            async with channel.holding(one):
                raise AssertionError("nothing was brought")
        two = learner.publish(2)
        with learner.read(two):
            async with channel.holding(two) as there:
                check_holds(there, two)
        assert not channel.is_lost

    learner = Learner(tmp_path)
    with over_tcp(learner, tmp_path) as channel:
        asyncio.run(scenario())


def test_without_a_choice_memory_is_shared_where_it_can_be():
    chosen = [channel_name(wanted, is_home=is_home) for wanted in (AUTO, SHM, TCP) for is_home in (True, False)]
    assert chosen == [SHM, TCP, SHM, SHM, TCP, TCP]


def test_a_version_is_brought_to_the_machine_of_its_sender():
    """By nccl that is the learner's, by ipc the engine's."""
    chosen = [channel_name(wanted, is_home=is_home) for wanted in (NCCL, IPC) for is_home in (True, False)]
    assert chosen == [SHM, SHM, SHM, TCP]


def check(wanted: str, gpus_per_replica: float = 1, gpus_per_rank: float = 1, workers: int = 1) -> None:
    check_channel(wanted, gpus_per_replica=gpus_per_replica, gpus_per_rank=gpus_per_rank, workers=workers)


def test_the_key_takes_the_names_of_every_channel():
    names = get_args(RolloutSection.model_fields["weight_channel"].annotation)
    assert set(names) == {AUTO, SHM, TCP, SHARDED_RDT, *NATIVE}
    for name in (AUTO, SHM, TCP):
        check(name, gpus_per_replica=0, gpus_per_rank=0)
    check(NCCL), check(NCCL, gpus_per_replica=4, gpus_per_rank=0.5, workers=4)
    check(IPC), check(IPC, gpus_per_replica=0.4, gpus_per_rank=0)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"wanted": SHARDED_RDT}, "workers are actors of Ray"),
        ({"wanted": NCCL, "gpus_per_replica": 0}, "engines on GPUs, with rollout.gpus_per_replica=0"),
        ({"wanted": IPC, "gpus_per_replica": 0}, "engines on GPUs, with rollout.gpus_per_replica=0"),
        ({"wanted": NCCL, "gpus_per_rank": 0}, "the learner's GPU, with train.gpus_per_rank=0"),
        ({"wanted": NCCL, "gpus_per_replica": 0.5}, r"rollout.gpus_per_replica=0\.5 others share it"),
        ({"wanted": IPC, "gpus_per_replica": 2, "workers": 2}, "one GPU, with 2 processes of one engine"),
    ],
)
def test_what_cannot_work_is_refused_by_name_with_the_reason(given, why):
    with pytest.raises(ConfigError, match=rf"{given['wanted']}: .*{why}.*\n.*\n.*leave it at auto") as refused:
        check(**given)
    assert refused.value.what == "rollout.weight_channel"


def test_a_refused_channel_is_found_before_anything_is_looked_at(tmp_path):
    (tmp_path / "config.yaml").write_text("{run: {name: x}, model: {path: /nowhere}, rollout: {weight_channel: nccl}}")
    config = load_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"rollout\.weight_channel"):
        check_references(config)


@pytest.mark.parametrize(("channel", "spots"), [(NCCL, ["learner", "learner"]), (IPC, [None, None]), (AUTO, [])])
def test_every_engine_gets_a_sender_beside_the_learner_or_beside_itself(channel, spots):
    opened: list[str | None] = []

    async def answer_with(spot: str | None) -> None:
        opened.append(spot)

    async def of_learner() -> str:
        asked.append("learner")
        return "learner"

    asked: list[str] = []
    actor = SimpleNamespace(open_sender=SimpleNamespace(remote=answer_with))
    fleet, learner, nothing = Mock(), SimpleNamespace(spot=of_learner), Mock()
    machines = RayMachines(
        fleet,
        learner,  # type: ignore[arg-type]
        nothing,
        home="here",
        weight_channel=channel,
        bundle={},
        run="run",
        new_engine=nothing,
        new_mirror=nothing,
    )

    async def admit_two() -> None:
        for name in ("rollout-0", "rollout-1"):
            await machines.admit(name, actor, SimpleNamespace(node="here"))  # type: ignore[arg-type]

    asyncio.run(admit_two())
    assert opened == spots and len(asked) == (channel == NCCL)
    assert [call.args[0] for call in fleet.admit.call_args_list] == ["rollout-0", "rollout-1"]


def test_a_sender_sees_the_gpu_of_its_spot_alone():
    assert Spot(node="n", gpu="3").environment()["CUDA_VISIBLE_DEVICES"] == "3"
    assert Spot(node="n", gpu=None).environment() == {}


def test_shared_memory_to_other_machines_is_refused():
    check_reach(SHM, 0), check_reach(AUTO, 3), check_reach(TCP, 3)
    with pytest.raises(ConfigError, match="shm, with 2 engines on other machines"):
        check_reach(SHM, 2)
