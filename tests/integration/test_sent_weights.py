"""Weights that a sender beside the engine sends by a backend of vLLM's kind: exact, stamped, proven, and never a hang.

The backend is a stand-in (``gloo_backend``), since vLLM's own ones take GPUs; the rest is what runs with them. One
engine serves most of the file, in the order of the tests; wrong weights end its life.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import ray

from rlsys.actors.cluster import ray_cluster
from rlsys.actors.remote import answer
from rlsys.actors.sender import Spot
from rlsys.config.schema import RaySection
from rlsys.errors import EngineLost, WeightsRefused
from rlsys.records import Turn, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.vllm_settings import engine_environment
from rlsys.weights.owner import is_process_alive
from tests.integration.serving import (
    PROMPT,
    Bench,
    difference_of,
    published,
    running,
    serving_folder,
    settings_of,
)

pytestmark = pytest.mark.engines

NUM_LONG = 560  # tokens of a request that lives through the swaps
SENT = {"worker_extension": "tests.integration.gloo_backend.WorkerExtension", "weight_backend": "test_gloo"}


class InThread:
    """A sender in a thread of this process, and vLLM's client that calls the engine back on its event loop."""

    def __init__(self) -> None:
        from rlsys.weights.vllm_sender import Sender
        from tests.integration.gloo_backend import BACKEND  # reads the environment when it is imported

        self.engine: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sender = Sender(BACKEND, self, host="127.0.0.1", workers=1, device="cpu")

    async def prepare(self, weights: WeightVersion) -> None:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._sender.prepare, weights)

    async def send(self, weights: WeightVersion) -> None:
        await asyncio.to_thread(self._sender.send, weights)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._call(self.engine.alive().init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    def start_weight_update(self) -> None:
        self._call(self.engine.alive().start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._call(self.engine.alive().update_weights(WeightTransferUpdateRequest(update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call(self.engine.alive().finish_weight_update(weight_version))

    def _call(self, call: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(call, self._loop).result(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    with serving_folder(tmp_path_factory.mktemp("engine")) as folder:
        yield folder


def _served_by(sender: InThread, name: str, folder: Path, timeout_s: float) -> Any:
    return running(name, folder, timeout_s, sender, **SENT)


@pytest.fixture(scope="module")
def bench(folder) -> Iterator[Bench]:
    sender = InThread()
    with _served_by(sender, "rollout-0", folder, timeout_s=60) as bench:
        sender.engine = bench.engine
        yield bench


@pytest.fixture
def fault() -> Iterator[Path]:
    from tests.integration.gloo_backend import FAULT

    yield FAULT
    FAULT.unlink(missing_ok=True)


def _request(name: str, max_tokens: int = 32) -> GenerateRequest:
    return GenerateRequest(request_id=name, token_ids=PROMPT, max_tokens=max_tokens, temperature=1.0, seed=3)


def test_versions_sent_to_a_serving_engine_are_proven_and_every_token_is_that_of_its_stamp(bench):
    versions = {1: bench.weights(1), 2: bench.weights(2, previous=1), 3: bench.weights(3, previous=2)}

    async def scenario() -> tuple[Turn, list[float]]:
        reports = [await bench.engine.load_weights(versions[1])]
        in_flight = asyncio.create_task(bench.engine.generate(_request("in-flight", NUM_LONG)))
        for step in (2, 3):
            await asyncio.sleep(0.2)
            reports.append(await bench.engine.load_weights(versions[step]))
        return await in_flight, [report.probe_difference for report in reports]

    turn, differences = bench.run(scenario())
    assert max(differences) < 1e-4
    assert bench.engine.version == versions[3].version
    assert len(turn.token_ids_T) == NUM_LONG
    assert list(dict.fromkeys(turn.versions_T)) == [weights.version.code for weights in versions.values()]
    for step, weights in versions.items():
        is_of_it = turn.versions_T == weights.version.code
        assert difference_of(turn, step)[is_of_it].max() < 1e-3
        assert difference_of(turn, step)[~is_of_it].mean() > 0.1  # they are far enough apart to mean something


def test_a_corrupted_segment_is_refused_before_the_pause_and_the_old_version_is_served_on(bench):
    served = bench.engine.version
    weights = bench.weights(4)
    entry = next(entry for entry in weights.tensors if entry.name == "model.layers.1.mlp.down_proj.weight")
    data = bytearray(Path(weights.segment).read_bytes())
    data[entry.offset] ^= 1
    Path(weights.segment).write_bytes(data)

    async def refuse_in_flight() -> Turn:
        in_flight = asyncio.create_task(bench.engine.generate(_request("through", 200)))
        await asyncio.sleep(0.1)
        with pytest.raises(WeightsRefused, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
            await bench.engine.load_weights(weights)
        return await in_flight

    turn = bench.run(refuse_in_flight())
    assert bench.engine.version == served and set(turn.versions_T) == {served.code}
    with pytest.raises(WeightsRefused, match="cannot be mapped"):
        bench.run(bench.engine.load_weights(replace(weights, segment=str(bench.folder / "gone"))))
    bench.run(bench.engine.load_weights(bench.weights(5)))
    assert difference_of(bench.run(bench.engine.generate(_request("after"))), 5).max() < 1e-3


def test_wrong_bytes_that_were_sent_whole_fail_the_proof_and_the_engine_serves_nothing_more(bench):
    """What arrives is not compared with checksums again: the probe is what tells."""
    good, bad = bench.weights(6), bench.weights(7)
    with pytest.raises(WeightsRefused, match="differ from the learner's"):
        bench.run(bench.engine.load_weights(replace(bad, version=good.version, probe=good.probe)))
    with pytest.raises(EngineLost, match="failed its proof"):
        bench.run(bench.engine.generate(_request("unproven", 4)))


@pytest.mark.parametrize("name", ["die", "hang"])
def test_a_sender_that_breaks_down_or_hangs_loses_its_engine_within_the_deadline(folder, fault, name):
    sender, deadline_s = InThread(), 5.0
    with _served_by(sender, f"rollout-{name}", folder, timeout_s=deadline_s) as bench:
        sender.engine = bench.engine
        bench.run(bench.engine.load_weights(bench.weights(1)))
        fault.write_text(name)
        started = perf_counter()
        said = "the sender broke down" if name == "die" else "waited 5 s for weights 0.2"
        with pytest.raises(EngineLost, match=said):
            bench.run(bench.engine.load_weights(bench.weights(2, previous=1)))
        assert perf_counter() - started < deadline_s + 2
        fault.unlink()
        with pytest.raises(EngineLost):
            bench.run(bench.engine.generate(_request("late", 4)))


def test_a_sender_of_ray_sends_from_where_it_is_put_and_goes_with_its_engine(folder):
    from tests.integration.gloo_backend import GlooRolloutActor

    first, second = published(folder, 1), published(folder, 2, previous=1)

    async def scenario() -> None:
        options = {"max_concurrency": 16, "runtime_env": {"env_vars": engine_environment(cpus=1, gpus=0)}}
        actor = ray.remote(GlooRolloutActor).options(**options).remote("rollout-ray", settings_of(folder, 60, **SENT))
        await actor.start.remote()
        await actor.open_sender.remote(None)
        for weights in (first, second):
            report = await answer(actor.load.remote(weights), "rollout-ray", EngineLost)
            assert report.version == weights.version and report.probe_difference < 1e-4
        os.kill(await actor.pid_of_sender.remote(), signal.SIGKILL)
        with pytest.raises(EngineLost, match="the weight sender of rollout-ray died"):
            await answer(actor.load.remote(first), "rollout-ray", EngineLost)
        await actor.open_sender.remote(None)
        another = await actor.pid_of_sender.remote()
        ray.kill(actor)
        assert await asyncio.to_thread(_ends, another)

    with ray_cluster(RaySection(address="local", dashboard=False), "sent-weights"):
        asyncio.run(scenario())
        environment = {"env_vars": Spot(node="", gpu="3").environment()}
        assert ray.get(ray.remote(_visible_gpus).options(num_cpus=0, runtime_env=environment).remote()) == "3"


def _visible_gpus() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _ends(pid: int) -> bool:
    until = perf_counter() + 10
    while is_process_alive(pid) and perf_counter() < until:
        sleep(0.1)
    return not is_process_alive(pid)
