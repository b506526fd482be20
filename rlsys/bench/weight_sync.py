"""``rlsys bench weight-sync``: what it costs to carry weights from the learner's memory into serving engines.

Transport alone: every tensor copied into a warm segment with its checksum (export), the checksums compared (verify),
every tensor copied out, against one warm copy of the same bytes from memory to memory in the same run; the fastest of
a few each. Then real vLLM engines under load: how long a swap holds generation up, and which share of the time that is
with one update every ten seconds. Random weights, float32 on both sides, one thread for the copies.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlsys.bench.report import Report
from rlsys.models.folder import write_folder
from rlsys.models.tiny.model import make_random_model, make_tokenizer
from rlsys.records import LoadReport, Probe, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.vllm_settings import VllmSettings, engine_environment
from rlsys.train.logprobs import token_logprobs
from rlsys.weights.probe import probe_sequences
from rlsys.weights.segment import SegmentReader, SegmentWriter, remove_segments, segment_path

RUN = "bench-weight-sync"
REPEATS = 7
MOST_ENGINES = 4
IN_FLIGHT = 16  # requests on each engine
REQUEST_TOKENS = 400
UPDATES = 3
UPDATE_PERIOD_S = 10.0
MAX_TRANSPORT, MAX_PAUSED = 4.0, 0.05
PROMPT = list(range(10, 26))


def measure() -> Report:
    """Figures: ``<size>/transport_to_memcpy`` and its parts in seconds, ``<size>/<n>_engines/pause_ms`` and
    ``load_ms`` (means), ``m135/paused_share``; and ``shm/transport_to_memcpy``, ``shm/pause_ms`` and ``paused_share``,
    which are those of the 135M model and one engine."""
    figures: dict[str, float] = {}
    with _segments(), tempfile.TemporaryDirectory() as folder:
        for size, model in (("tiny", make_random_model(make_tokenizer())), ("m135", _model_of_135m())):
            figures |= {f"{size}/{name}": value for name, value in transport(model).items()}
            path = Path(folder) / size
            write_folder(path, model, model.config, GenerationConfig(eos_token_id=1), make_tokenizer())
            for num_engines in (1, 2, MOST_ENGINES) if size == "tiny" else (1,):
                period_s = UPDATE_PERIOD_S if size == "m135" else 1.0
                found = asyncio.run(_serve(path, model, num_engines, period_s))
                figures |= {f"{size}/{num_engines}_engines/{name}": value for name, value in found.items()}
    figures["shm/transport_to_memcpy"] = figures["m135/transport_to_memcpy"]
    figures["shm/pause_ms"] = figures["m135/1_engines/pause_ms"]
    figures["paused_share"] = figures["m135/1_engines/paused_share"]
    return Report(figures=figures, table=_table(figures))


def transport(model: PreTrainedModel, repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of one memory copy of all weights, of export, verification and copying out, and their ratio."""
    weights = dict(model.named_parameters())
    targets = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    path = segment_path(RUN, "transport")
    writer = SegmentWriter(path, torch.float32)

    def copy() -> None:
        for name, tensor in weights.items():
            targets[name].copy_(tensor.detach())

    def export() -> None:
        for name, tensor in weights.items():
            writer.write(name, tensor)
        writer.finish()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, tensor in weights.items():  # once for the pages
            writer.write(name, tensor)
        reader = SegmentReader(str(path), writer.finish())

        def copy_out() -> None:
            for name, tensor in reader.tensors():
                targets[name].copy_(tensor)

        seconds = {
            "memcpy_s": _fastest(copy, repeats),
            "export_s": _fastest(export, repeats),
            "verify_s": _fastest(reader.verify, repeats),
            "copy_out_s": _fastest(copy_out, repeats),
        }
    finally:
        torch.set_num_threads(threads)
    transported_s = seconds["export_s"] + seconds["verify_s"] + seconds["copy_out_s"]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    return {
        **seconds,
        "megabytes": num_bytes / 1e6,
        "transport_s": transported_s,
        "transport_to_memcpy": transported_s / seconds["memcpy_s"],
    }


async def _serve(path: Path, model: PreTrainedModel, num_engines: int, period_s: float) -> dict[str, float]:
    """Mean pause and mean load of a swap, milliseconds, with every engine under load; and the paused share."""
    from rlsys.rollout.vllm_engine import VllmEngine  # reads the environment when it is imported

    settings = VllmSettings(
        model=str(path),
        dtype="float32",
        max_model_len=512,
        slots=IN_FLIGHT,
        seed=0,
        start_timeout_s=600,
        timeout_s=300,
    )
    engines = [VllmEngine(f"bench-{number}", settings) for number in range(num_engines)]
    versions = _versions(model)
    try:
        for engine in engines:
            await engine.start()
            await engine.load_weights(versions[0])
        is_over = asyncio.Event()
        clients = [
            asyncio.create_task(_generate(engine, is_over, number)) for engine in engines for number in range(IN_FLIGHT)
        ]
        await asyncio.sleep(1.0)
        began, reports = time.perf_counter(), list[LoadReport]()
        for update in range(UPDATES):
            weights = replace(versions[1 - update % 2], version=Version(incarnation=0, step=update + 1))
            reports += await asyncio.gather(*(engine.load_weights(weights) for engine in engines))
            await asyncio.sleep(max(0.0, began + (update + 1) * period_s - time.perf_counter()))
        wall_s = time.perf_counter() - began
        is_over.set()
        await asyncio.gather(*clients)
    finally:
        for engine in engines:
            await engine.stop()
    return {
        "pause_ms": 1e3 * float(np.mean([report.pause_s for report in reports])),
        "load_ms": 1e3 * float(np.mean([report.total_s for report in reports])),
        "paused_share": sum(report.pause_s for report in reports) / num_engines / wall_s,
    }


async def _generate(engine: Any, is_over: asyncio.Event, number: int) -> None:
    seed = number
    while not is_over.is_set():
        seed += 1000
        request = GenerateRequest(
            request_id=f"{number}-{seed}", token_ids=PROMPT, max_tokens=REQUEST_TOKENS, temperature=1.0, seed=seed
        )
        await engine.generate(request)


def _versions(model: PreTrainedModel) -> tuple[WeightVersion, WeightVersion]:
    """Two versions in two segments that differ in every weight."""
    probes, manifests, paths = [], [], []
    for number in range(2):
        if number:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.02)
        paths.append(segment_path(RUN, f"version-{number}"))
        writer = SegmentWriter(paths[-1], torch.float32)
        for name, tensor in model.named_parameters():
            writer.write(name, tensor)
        manifests.append(writer.finish())
        probes.append(_probe(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.02)
    return (
        WeightVersion(
            version=Version(incarnation=0, step=0),
            segment=str(paths[0]),
            tensors=manifests[0],
            probe=probes[0],
            previous_probe=None,
        ),
        WeightVersion(
            version=Version(incarnation=0, step=1),
            segment=str(paths[1]),
            tensors=manifests[1],
            probe=probes[1],
            previous_probe=None,
        ),
    )


def _probe(model: PreTrainedModel) -> Probe:
    sequences = probe_sequences(model.config.vocab_size, seed=0)
    token_ids = torch.tensor(np.stack(sequences)).long()
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
    with torch.no_grad():
        logits = model(input_ids=token_ids, position_ids=positions, use_cache=False).logits
        rows = token_logprobs(logits, token_ids, positions, temperature=1.0).logprobs
    return Probe(token_ids=sequences, logprobs=tuple(rows.numpy()))


def _model_of_135m() -> LlamaForCausalLM:
    """Random weights in the shape of SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def _fastest(run: Callable[[], None], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@contextmanager
def _segments() -> Iterator[None]:
    """The engines' environment, and no segment left behind."""
    before = dict(os.environ)
    os.environ.update(engine_environment(cpus=1, gpus=0, kv_cache_gib=1))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        remove_segments(RUN)


def _table(figures: Mapping[str, float]) -> str:
    lines = [f"{'weights':<28}{'MB':>8}{'memcpy':>10}{'export':>10}{'verify':>10}{'copy out':>10}{'x memcpy':>10}"]
    for size in ("tiny", "m135"):
        values = [figures[f"{size}/{name}"] for name in ("memcpy_s", "export_s", "verify_s", "copy_out_s")]
        cells = "".join(f"{1e3 * value:>8.2f}ms" for value in values)
        ratio = figures[f"{size}/transport_to_memcpy"]
        lines.append(f"{size:<28}{figures[f'{size}/megabytes']:>8.1f}{cells}{ratio:>10.2f}")
    lines.append(f"{'engines under load':<28}{'pause':>10}{'load':>10}{'paused':>10}")
    for key in _engine_keys(figures):
        pause, load, share = (figures[f"{key}/{name}"] for name in ("pause_ms", "load_ms", "paused_share"))
        lines.append(f"{key:<28}{pause:>8.0f}ms{load:>8.0f}ms{share:>10.1%}")
    lines.append(
        f"wanted of m135: at most {MAX_TRANSPORT:g} x memcpy, under {MAX_PAUSED:.0%} paused at one update in 10 s"
    )
    return "\n".join(lines)


def _engine_keys(figures: Mapping[str, float]) -> Sequence[str]:
    return [name.removesuffix("/pause_ms") for name in figures if name.endswith("_engines/pause_ms")]
