"""Real engines that serve requests while versions of their weights come: how long each swap holds generation up, how
long a version takes to be served, what packing costs and what an engine holds in memory."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlsys.records import LoadReport, Probe, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.vllm_settings import VllmSettings
from rlsys.train.export import FullWeights
from rlsys.weights.probe import probe_sequences
from rlsys.weights.segment import SegmentWriter, segment_path
from rlsys.weights.tcp import SegmentServer, mirror

IN_FLIGHT = 16  # requests on each engine, a new one for every one that ends
REQUEST_TOKENS = 128
UPDATES = 3
PROMPT = list(range(10, 26))
FACTOR = 1.25  # between the weights of two versions: log-probabilities differ by tenths
CHANNELS = ("shm", "tcp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured of one model.

    Attributes:
        engines: how many serve at once, one figure each; the most of them last. Those that the memory does not hold
            are left out, the first one excepted.
        period_s: between the beginnings of two updates.
        engine_mb: memory of an engine at the most.
    """

    engines: Sequence[int]
    period_s: float
    engine_mb: float

    def within(self, available_mb: float) -> Plan:
        first, *others = self.engines
        return replace(self, engines=[first, *(num for num in others if num * self.engine_mb <= available_mb)])


def measure_engines(folder: Path, model: PreTrainedModel, run: str, plan: Plan) -> dict[str, float]:
    """Figures as ``rlsys.bench.weight_sync`` names them, without the model's size. Changes the model's weights."""
    versions = _versions(model, run)
    return asyncio.run(_measure(folder, run, versions, plan.within(_available_mb())))


class _Supply:
    """The two versions by turns, each time as a new one, read from their own segments or mirrored from them."""

    def __init__(self, versions: Sequence[WeightVersion], run: str) -> None:
        self._versions, self._step = versions, 0
        self._there = str(segment_path(run, "mirror"))
        self._server = SegmentServer("127.0.0.1", [version.segment for version in versions])

    async def next(self, channel: str) -> WeightVersion:
        self._step += 1
        weights = replace(self._versions[self._step % 2], version=Version(incarnation=0, step=self._step))
        if channel == "tcp":
            return await asyncio.to_thread(mirror, weights, self._server.source, self._there)
        return weights

    def close(self) -> None:
        self._server.close()


async def _measure(folder: Path, run: str, versions: Sequence[WeightVersion], plan: Plan) -> dict[str, float]:
    supply, figures = _Supply(versions, run), dict[str, float]()
    try:
        async with _engines(folder, max(plan.engines)) as (engines, pids):
            weights = await supply.next("shm")
            await asyncio.gather(*(engine.load_weights(weights) for engine in engines))
            figures["engine_rest_mb"] = _status_mb(pids[0], "VmRSS")
            before = _cpu_s(pids[0])
            await engines[0].load_weights(await supply.next("shm"))
            figures["pack_cpu_s"] = _cpu_s(pids[0]) - before
            for num in plan.engines:
                async with _under_load(engines[:num]):
                    for channel in CHANNELS:
                        updates = UPDATES if channel == "shm" else 1
                        found = await _update(engines[:num], supply, channel, updates, plan.period_s)
                        figures |= {f"{num}_engines/{channel}/{name}": value for name, value in found.items()}
            figures["engine_peak_mb"] = _status_mb(pids[0], "VmHWM")
    finally:
        supply.close()
    return figures


async def _update(
    engines: Sequence[Any], supply: _Supply, channel: str, updates: int, period_s: float
) -> dict[str, float]:
    """Means over updates and engines. A load over TCP begins with its mirror, which all engines share. The share of
    time is that of one update a period, also where a busy machine takes longer to bring one."""
    reports, load_s, began = list[LoadReport](), list[float](), time.perf_counter()
    for update in range(updates):
        asked = time.perf_counter()
        weights = await supply.next(channel)
        brought_s = time.perf_counter() - asked
        loads = await asyncio.gather(*(engine.load_weights(weights) for engine in engines))
        reports += loads
        load_s += [brought_s + load.total_s for load in loads]
        await asyncio.sleep(max(0.0, began + (update + 1) * period_s - time.perf_counter()))
    pause_s = float(np.mean([report.pause_s for report in reports]))
    return {"pause_ms": 1e3 * pause_s, "load_ms": 1e3 * float(np.mean(load_s)), "paused_share": pause_s / period_s}


@asynccontextmanager
async def _engines(folder: Path, num: int) -> AsyncIterator[tuple[list[Any], list[int]]]:
    """Running engines, and the process of each one's model."""
    from rlsys.rollout.vllm_engine import VllmEngine  # reads the environment when it is imported

    settings = VllmSettings(
        model=str(folder),
        dtype="float32",
        max_model_len=512,
        slots=IN_FLIGHT,
        seed=0,
        start_timeout_s=600,
        timeout_s=300,
    )
    engines, pids = list[Any](), list[int]()
    try:
        for number in range(num):
            others = multiprocessing.active_children()
            engines.append(VllmEngine(f"bench-{number}", settings))
            await engines[-1].start()
            pids += [int(child.pid or 0) for child in multiprocessing.active_children() if child not in others]
        yield engines, pids
    finally:
        await asyncio.gather(*(engine.stop() for engine in engines))


@asynccontextmanager
async def _under_load(engines: Sequence[Any]) -> AsyncIterator[None]:
    clients = [asyncio.create_task(_generate(engine, number)) for engine in engines for number in range(IN_FLIGHT)]
    await asyncio.sleep(1.0)
    try:
        yield
    finally:
        for client in clients:
            client.cancel()
        ended = await asyncio.gather(*clients, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome


async def _generate(engine: Any, number: int) -> None:
    seed = number
    while True:
        seed += 1000
        request = GenerateRequest(
            request_id=f"{number}-{seed}", token_ids=PROMPT, max_tokens=REQUEST_TOKENS, temperature=1.0, seed=seed
        )
        await engine.generate(request)


def _versions(model: PreTrainedModel, run: str) -> list[WeightVersion]:
    """Two versions in two segments that differ in every weight."""
    versions = []
    for number in range(2):
        path = segment_path(run, f"version-{number}")
        writer = SegmentWriter(path, torch.float32)
        for bucket in FullWeights(model, deepspeed=torch, zero_stage=0):
            writer.write(bucket)
        versions.append(
            WeightVersion(
                version=Version(incarnation=0, step=number),
                segment=str(path),
                tensors=writer.finish(),
                probe=_probe(model),
                previous_probe=None,
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(FACTOR)
    return versions


def _probe(model: PreTrainedModel) -> Probe:
    sequences = probe_sequences(model.config.vocab_size, seed=0)
    token_ids_PT = torch.from_numpy(np.stack(sequences)).long()
    with torch.no_grad():
        table = torch.log_softmax(model(token_ids_PT, use_cache=False).logits[:, :-1].float(), dim=-1)
    chosen = table.gather(-1, token_ids_PT[:, 1:, None])[..., 0]
    return Probe(token_ids=sequences, logprobs=tuple(np.append(np.float32(0.0), row.numpy()) for row in chosen))


def _status_mb(pid: int, field: str) -> float:
    """Of a process: ``VmRSS``, resident memory now, or ``VmHWM``, the most of it so far; shared pages are in it."""
    return _field_mb(f"/proc/{pid}/status", field)


def _available_mb() -> float:
    """Memory of the machine that processes may take now."""
    return _field_mb("/proc/meminfo", "MemAvailable")


def _field_mb(path: str, field: str) -> float:
    (line,) = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024 / 1e6


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
