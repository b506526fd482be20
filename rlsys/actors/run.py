"""One run from its configuration to its result: folder, cluster, actors, loops, export, clean-up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsys.actors.cluster import check_resources, ray_cluster
from rlsys.actors.inputs import Inputs
from rlsys.actors.setup import Built, build_run
from rlsys.config.schema import Config
from rlsys.errors import RlsysError
from rlsys.observe.progress import Progress
from rlsys.observe.ray_metrics import RayGauges
from rlsys.observe.rollout_log import RolloutLog
from rlsys.observe.run_folder import RunFolder, redirect_library_output
from rlsys.observe.sink import RunSink
from rlsys.observe.trackers import MetricsFile, TensorBoard, Tracker, Trackers
from rlsys.weights.segment import remove_segments

DONE, FAILED, INTERRUPTED = 0, 1, 130
STOP_TIMEOUT_S = 30.0  # for the engines to shut down in order; what hangs longer is killed with the cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes:
        exit: exit status of the command: 0 done, 1 failed, 130 interrupted.
        folder: the run folder.
        figures: what ``result.json`` holds.
        failure: why it did not end well; empty where it did.
    """

    exit: int
    folder: Path
    figures: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def run_training(config: Config, inputs: Inputs) -> RunResult:
    """Train as ``config`` (resolved and checked) says.

    Raises:
        ConfigError: the cluster cannot hold the run; no actor was started.
    """
    folder = RunFolder(config.run.root, config.run.name)
    with redirect_library_output(folder.log_path) as terminal:
        sink = _open_sink(config, folder, Progress(terminal, config.run.steps))
        last_words = "stopped before the first step"
        try:
            with ray_cluster(config.ray, namespace=f"rlsys-{config.run.name}") as dashboard:
                check_resources(config)
                folder.write_config(config.model_dump(mode="json"))
                sink.event(f"run folder {folder.path}" + (f", Ray dashboard {dashboard}" if dashboard else ""))
                result = asyncio.run(_drive(config, inputs, sink, folder))
                last_words = _last_words(result)
        finally:
            sink.close(last_words)
    folder.write_result({**result.figures, "exit": result.exit, "failure": result.failure})
    return result


async def _drive(config: Config, inputs: Inputs, sink: RunSink, folder: RunFolder) -> RunResult:
    """Build, run, export. A failure of the run is a result; what was measured until then is kept."""
    _interrupt_on_signals()
    built: Built | None = None
    status, failure = DONE, ""
    try:
        sink.event("starting the rollout engines, the learner and the reward workers")
        built = await build_run(config, inputs, sink)
        await built.loops.run()
        await built.learner.save(str(folder.model_path))
    except RlsysError as error:
        status, failure = FAILED, f"{type(error).__name__}: {error}"
    except asyncio.CancelledError:
        status, failure = INTERRUPTED, "interrupted"
    finally:
        if built is not None:
            await _stop(config, built, sink)
        remove_segments(config.run.name)  # also where the learner, whose they are, can no longer do it
    figures = built.loops.summary() if built is not None else {}
    return RunResult(exit=status, folder=folder.path, figures=figures, failure=failure)


def _interrupt_on_signals() -> None:
    """SIGINT and SIGTERM end the run in order. Installed after Ray's own handlers, which would end it at once."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    if task is None:
        raise RuntimeError("signals can only be handled for a running task")
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)


async def _stop(config: Config, built: Built, sink: RunSink) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await built.fleet.stop()
            await built.learner.stop(config.run.name)
    except (RlsysError, TimeoutError) as error:  # the run is over; the cluster's end takes what is left
        sink.event(f"not everything stopped in order: {error}")


def _open_sink(config: Config, folder: RunFolder, progress: Progress) -> RunSink:
    trackers: list[Tracker] = [MetricsFile(folder.metrics_path)]
    if config.observe.tensorboard:
        trackers.append(TensorBoard(folder.tensorboard_path))
    per_step = config.observe.rollouts_per_step
    return RunSink(
        trackers=Trackers(trackers),
        progress=progress,
        log=folder.open_log(),
        rollout_log=RolloutLog(folder.rollouts_path, per_step) if per_step else None,
        gauges=RayGauges(config.run.name),
    )


def _last_words(result: RunResult) -> str:
    if result.exit == DONE:
        accuracy = f"accuracy {result.figures['eval_before']:.3f} -> {result.figures['eval_after']:.3f}"
        return f"done: {accuracy}, {result.figures['wall_s']:.0f} s of training; model in {result.folder / 'model'}"
    where = f"see {result.folder / 'log.txt'}"
    return f"{'interrupted' if result.exit == INTERRUPTED else 'failed'}: {result.failure}\n{where}"
