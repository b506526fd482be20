"""``rlsys bench weight-sync``: what it costs to carry weights from the learner's memory into serving engines.

Transport alone, on one thread, the fastest of a few: what the learner exports into a warm segment with its checksums
(float32, or cast to bfloat16), what an engine's driver verifies, and a copy out of it, by readers that are kept from
one version to the next as engines keep them; over TCP, the mirror's copy comes to it. Beside it one warm copy of the
same tensors from memory to memory in the same run. Then real engines that serve requests while versions come
(``weight_sync_engines``).
Random weights in the shapes of the embedded model and of SmolLM2-135M.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from rlsys.bench.report import Report
from rlsys.bench.smollm2_shape import make_random_smollm2
from rlsys.bench.timing import fastest_s, threads
from rlsys.bench.weight_sync_engines import Plan, measure_engines
from rlsys.models.folder import write_folder
from rlsys.models.tiny.model import make_random_model, make_tokenizer
from rlsys.records import Probe, TensorEntry, Version, WeightVersion
from rlsys.rollout.vllm_settings import engine_environment
from rlsys.train.export import FullWeights
from rlsys.weights.readers import SegmentReaders
from rlsys.weights.segment import SegmentWriter, remove_segments, segment_path
from rlsys.weights.tcp import SegmentServer, mirror

RUN = "bench-weight-sync"
REPEATS = 9
MAX_TRANSPORT, MAX_PAUSED = 4.0, 0.05
PARTS = ("memcpy_s", "export_s", "verify_s", "copy_out_s")
PLANS = {
    "tiny": Plan(engines=(1, 2, 3, 4), period_s=1.0, engine_mb=2000.0),
    "m135": Plan(engines=(1, 2, 3, 4), period_s=10.0, engine_mb=4500.0),
}


def measure() -> Report:
    """Figures: ``<size>/<channel>/transport_to_memcpy`` with its parts in seconds beside it;
    ``<size>/<n>_engines/<channel>/pause_ms`` and ``load_ms`` (means) and ``paused_share``; the CPU seconds of loading
    and packing and the memory of one engine as ``<size>/pack_cpu_s``, ``engine_rest_mb`` and ``engine_peak_mb``.
    ``shm/transport_to_memcpy``, ``shm/pause_ms`` and ``paused_share`` are those of the 135M model and one engine."""
    figures: dict[str, float] = {}
    with _surroundings() as folder:
        for size, make in (("tiny", lambda: make_random_model(make_tokenizer())), ("m135", make_random_smollm2)):
            model = _through_files(make(), folder / size)
            figures |= {f"{size}/{name}": value for name, value in transport(model).items()}
            found = measure_engines(folder / size, model, RUN, PLANS[size])
            figures |= {f"{size}/{name}": value for name, value in found.items()}
    figures["shm/transport_to_memcpy"] = figures["m135/shm/transport_to_memcpy"]
    figures["shm/pause_ms"] = figures["m135/1_engines/shm/pause_ms"]
    figures["paused_share"] = figures["m135/1_engines/shm/paused_share"]
    return Report(figures=figures, table=_table(figures))


def transport(model: PreTrainedModel, repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of each part on the way, and of all parts together over those of one memory copy."""
    (weights,) = FullWeights(model, deepspeed=torch, zero_stage=0)  # no library is asked below stage 3
    targets = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}

    def copy() -> None:
        for name, tensor in weights.items():
            targets[name].copy_(tensor)

    with threads(1):
        found = {"memcpy_s": fastest_s(copy, repeats)}
        for channel, dtype in (("shm", torch.float32), ("bfloat16", torch.bfloat16)):
            parts = _segment_seconds(model, segment_path(RUN, channel), dtype, targets, repeats)
            found |= parts if channel == "shm" else {f"{channel}/{name}": value for name, value in parts.items()}
            found[f"{channel}/transport_to_memcpy"] = sum(parts.values()) / found["memcpy_s"]
        found["tcp_s"] = _tcp_seconds(model, repeats)
    found["tcp/transport_to_memcpy"] = found["shm/transport_to_memcpy"] + found["tcp_s"] / found["memcpy_s"]
    return {**found, "megabytes": sum(tensor.nbytes for tensor in weights.values()) / 1e6}


def _segment_seconds(
    model: PreTrainedModel, path: Path, dtype: torch.dtype, targets: Mapping[str, torch.Tensor], repeats: int
) -> dict[str, float]:
    writer, weights = SegmentWriter(path, dtype), FullWeights(model, deepspeed=torch, zero_stage=0)

    def export() -> tuple[TensorEntry, ...]:
        for bucket in weights:
            writer.write(bucket)
        return writer.finish()

    entries = export()
    driver, worker = SegmentReaders(), SegmentReaders()  # processes of their own, as it were

    def copy_out() -> None:
        views = dict(worker.open(str(path), entries).tensors())
        torch._foreach_copy_([targets[name] for name in views], [*views.values()])

    return {
        "export_s": fastest_s(export, repeats),
        "verify_s": fastest_s(lambda: driver.open(str(path), entries).verify(), repeats),
        "copy_out_s": fastest_s(copy_out, repeats),
    }


def _tcp_seconds(model: PreTrainedModel, repeats: int) -> float:
    """Of bringing the version into a segment of another machine, were this one it: both ends are here."""
    path, there = segment_path(RUN, "shm"), segment_path(RUN, "mirror")
    writer = SegmentWriter(path, torch.float32)
    for bucket in FullWeights(model, deepspeed=torch, zero_stage=0):
        writer.write(bucket)
    weights = WeightVersion(
        version=Version(incarnation=0, step=0),
        segment=str(path),
        tensors=writer.finish(),
        probe=Probe(token_ids=(), logprobs=()),
        previous_probe=None,
    )
    server = SegmentServer("127.0.0.1", [path])
    try:
        return fastest_s(lambda: mirror(weights, server.source, there), repeats)
    finally:
        server.close()


def _through_files(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """As the learner has it: read from the files that the engines start with."""
    write_folder(folder, model, model.config, GenerationConfig(eos_token_id=1), make_tokenizer())
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loaded


@contextmanager
def _surroundings() -> Iterator[Path]:
    """A folder, the engines' environment, and no segment left behind."""
    before = dict(os.environ)
    os.environ.update(engine_environment(cpus=1, gpus=0))
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        os.environ.clear()
        os.environ.update(before)
        remove_segments(RUN)


def _table(figures: Mapping[str, float]) -> str:
    lines = [f"{'transport':<12}{'MB':>8}" + "".join(f"{name.removesuffix('_s'):>12}" for name in (*PARTS, "tcp_s"))]
    for size in PLANS:
        cells = "".join(f"{1e3 * figures[f'{size}/{name}']:>10.2f}ms" for name in (*PARTS, "tcp_s"))
        lines.append(f"{size:<12}{figures[f'{size}/megabytes']:>8.1f}{cells}")
    lines.append(f"{'x memcpy':<12}{'shm':>8}{'tcp':>12}{'bfloat16':>12}")
    for size in PLANS:
        shm, *others = (figures[f"{size}/{name}/transport_to_memcpy"] for name in ("shm", "tcp", "bfloat16"))
        lines.append(f"{size:<12}{shm:>8.2f}" + "".join(f"{other:>12.2f}" for other in others))
    lines.append(
        f"{'engines':<12}{'':>8}{'pause':>12}{'load':>12}{'paused':>12}{'load (tcp)':>12}{'one update in':>16}"
    )
    for size, plan in PLANS.items():
        for num in plan.engines:
            of = f"{size}/{num}_engines"
            if f"{of}/shm/pause_ms" not in figures:
                lines.append(f"{size:<12}{num:>8}  left out: wants {num * plan.engine_mb / 1e3:.0f} GB of free memory")
                continue
            pause, load, over_tcp = (figures[f"{of}/{name}"] for name in ("shm/pause_ms", "shm/load_ms", "tcp/load_ms"))
            share = figures[f"{of}/shm/paused_share"]
            cells = f"{pause:>10.0f}ms{load:>10.0f}ms{share:>12.1%}{over_tcp:>10.0f}ms{plan.period_s:>14.0f} s"
            lines.append(f"{size:<12}{num:>8}{cells}")
    for size in PLANS:
        cpu, rest, peak = (figures[f"{size}/{name}"] for name in ("pack_cpu_s", "engine_rest_mb", "engine_peak_mb"))
        lines.append(
            f"{size}: loading and packing {cpu:.2f} CPU s; an engine holds {rest:,.0f} MB, at most {peak:,.0f}"
        )
    lines.append(
        f"wanted: at most {MAX_TRANSPORT:g} x memcpy by shm; of m135 under {MAX_PAUSED:.0%} paused at an update in 10 s"
    )
    return "\n".join(lines)
