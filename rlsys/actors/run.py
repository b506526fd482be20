"""One run from its configuration to its result: folder, cluster, actors, loops, export, clean-up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rlsys.actors.checkpoint import Start, find_start
from rlsys.actors.cluster import check_resources, ray_cluster
from rlsys.actors.inputs import Inputs
from rlsys.actors.other_layout import check_learner, in_layout, remove_converted
from rlsys.actors.rollout import RolloutActor
from rlsys.actors.setup import Built, build_run
from rlsys.checkpoints.store import CheckpointStore
from rlsys.config.schema import Config
from rlsys.controller.loops import Loops
from rlsys.controller.state import RunState
from rlsys.errors import DONE, FAILED, INTERRUPTED, RlsysError
from rlsys.observe.lineage import CommitLog, check_exactly_once, rewind_metrics
from rlsys.observe.progress import Progress
from rlsys.observe.ray_metrics import RayGauges
from rlsys.observe.rollout_log import RolloutLog
from rlsys.observe.run_folder import RunFolder, redirect_library_output
from rlsys.observe.sink import RunSink
from rlsys.observe.trackers import MetricsFile, TensorBoard, Tracker, Trackers
from rlsys.weights.segment import remove_segments

STOP_TIMEOUT_S = 30.0  # for the engines to shut down in order; what hangs longer is killed with the cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes:
        exit: exit status of the command: 0 done, 1 failed, 130 interrupted (during the training: after a checkpoint).
        folder: the run folder.
        figures: what ``result.json`` holds.
        failure: why it did not end well; empty where it did.
    """

    exit: int
    folder: Path
    figures: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def run_training(
    config: Config, inputs: Inputs, *, resume: bool = False, rollout_actor: type[RolloutActor] = RolloutActor
) -> RunResult:
    """Train as ``config`` (resolved and checked) says.

    Args:
        resume: go on from the newest checkpoint in the run folder; from the beginning where there is none yet.
        rollout_actor: what plays the rollouts.

    Raises:
        ConfigError: the cluster cannot hold the run, another process runs in its folder, or the model is not that of
            the checkpoint; no actor was started.
        CheckpointDamaged: no checkpoint can be gone on from.
    """
    folder = RunFolder(config.run.root, config.run.name)
    with folder.locked(), redirect_library_output(folder.log_path) as terminal:
        store = CheckpointStore(folder.checkpoints_path, config.checkpoint.keep)
        start = find_start(store, folder.commits_path, inputs.source) if resume else Start(state=RunState())
        check_learner(config, inputs, start)
        sink = _open_sink(config, folder, terminal, start)
        last_words = "stopped before the first step"
        try:
            with ray_cluster(config.ray, namespace=f"rlsys-{config.run.name}") as dashboard:
                check_resources(config)
                folder.result_path.unlink(missing_ok=True)  # of an earlier part of the run
                folder.write_config(config.model_dump(mode="json"))
                sink.event(f"run folder {folder.path}" + (f", Ray dashboard {dashboard}" if dashboard else ""))
                for sentence in start.told:
                    sink.event(sentence)
                start = in_layout(config, start, sink.event)
                result = asyncio.run(_drive(config, inputs, sink, folder, start, store, rollout_actor))
                last_words = _last_words(result, store)
        finally:
            sink.close(last_words)
        folder.write_result({**result.figures, "exit": result.exit, "failure": result.failure})
    return result


def finished(config: Config) -> RunResult | None:
    """The result of the run in the folder of ``config``, where it ended well with as many steps as that asks for."""
    folder = RunFolder(config.run.root, config.run.name)
    result = folder.read_result()
    if result.get("exit") != DONE or result.get("steps", 0) < config.run.steps:
        return None
    return RunResult(exit=DONE, folder=folder.path, figures=result)


async def _drive(
    config: Config,
    inputs: Inputs,
    sink: RunSink,
    folder: RunFolder,
    start: Start,
    store: CheckpointStore,
    rollout_actor: type[RolloutActor],
) -> RunResult:
    """Build, run, export. A failure of the run is a result; what was measured until then is kept."""
    stop = _Stop(sink)
    built: Built | None = None
    status, failure = DONE, ""
    try:
        sink.event("starting the rollout engines, the learner and the reward workers")
        built = await build_run(config, inputs, sink, start, store, rollout_actor)
        remove_converted(start)
        stop.loops = built.loops
        await built.loops.run()
        if built.loops.stopping.is_set():
            status, failure = INTERRUPTED, f"stopped after step {built.loops.version.step}"
        else:
            check_exactly_once(folder.commits_path, built.loops.version.step)
            await built.learner.save(str(folder.model_path))
            await built.learner.save_adapter(str(folder.adapter_path))
    except RlsysError as error:
        status, failure = FAILED, f"{type(error).__name__}: {error}"
    except asyncio.CancelledError:
        status, failure = INTERRUPTED, "interrupted at once"
    finally:
        if built is not None:
            await _stop_parts(config, built, sink)
        remove_segments(config.run.name)  # also where the learner, whose they are, can no longer do it
    figures = built.loops.summary() if built is not None else {}
    return RunResult(exit=status, folder=folder.path, figures=figures, failure=failure)


class _Stop:
    """SIGINT and SIGTERM. During the training the first one ends it after the step under way, with a checkpoint; at any
    other time, and the second one always, ends the run at once. Made after Ray's own handlers, which would end it
    at once."""

    def __init__(self, sink: RunSink) -> None:
        self.loops: Loops | None = None
        self._sink = sink
        task = asyncio.current_task()
        assert task is not None  # made by a coroutine
        self._task = task
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.loops is None or not self.loops.is_training or self.loops.stopping.is_set():
            self._task.cancel()
            return
        self._sink.event(
            f"{number.name}: stopping after the step under way, with a checkpoint; a second signal stops at once"
        )
        self.loops.stopping.set()


async def _stop_parts(config: Config, built: Built, sink: RunSink) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await built.fleet.stop()
            await built.learner.stop(config.run.name)
            if built.teacher is not None:
                await built.teacher.stop()
    except (RlsysError, TimeoutError) as error:  # the run is over; the cluster's end takes what is left
        sink.event(f"not everything stopped in order: {str(error) or type(error).__name__}")


def _open_sink(config: Config, folder: RunFolder, terminal: TextIO, start: Start) -> RunSink:
    version = start.state.version
    elapsed_s = rewind_metrics(folder.metrics_path, version.step)
    trackers: list[Tracker] = [MetricsFile(folder.metrics_path)]
    if config.observe.tensorboard:
        trackers.append(TensorBoard(folder.tensorboard_path, first_step=version.step + 1))
    per_step = config.observe.rollouts_per_step
    return RunSink(
        trackers=Trackers(trackers),
        progress=Progress(terminal, config.run.steps, version),
        log=folder.open_log(),
        commits=CommitLog(folder.commits_path),
        rollout_log=RolloutLog(folder.rollouts_path, per_step) if per_step else None,
        elapsed_s=elapsed_s,
        gauges=RayGauges(config.run.name),
    )


def _last_words(result: RunResult, store: CheckpointStore) -> str:
    if result.exit == DONE:
        accuracy = f"accuracy {result.figures['eval_before']:.3f} -> {result.figures['eval_after']:.3f}"
        return f"done: {accuracy}, {result.figures['wall_s']:.0f} s of training; model in {result.folder / 'model'}"
    step = store.newest_step()
    resume = f"--resume goes on from step {step}" if step is not None else "there is no checkpoint to go on from"
    where = f"{resume}; see {result.folder / 'log.txt'}"
    return f"{'interrupted' if result.exit == INTERRUPTED else 'failed'}: {result.failure}\n{where}"
