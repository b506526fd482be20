"""The sides of a run without anything of ours between them: how long the engine takes to sample a list of rollouts, or
the learner to train it, alone on given cores or both at once on a core each. Each is a process of its own, because
libraries read their number of threads when they are imported: ``measure_sides`` starts them."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import AutoTokenizer

from rlsys.actors.algorithm import objective_of
from rlsys.actors.clock import WallClock
from rlsys.actors.inputs import Inputs
from rlsys.actors.setup import engine_settings, make_batch, make_plan
from rlsys.bench.fixed_lengths import FixedLengths
from rlsys.bench.overlap_runs import batches_of, inputs_of, members_of
from rlsys.config.schema import Config
from rlsys.envs.single_turn import SingleTurn
from rlsys.errors import ConfigError, RlsysError, WaitTimeout
from rlsys.records import (
    NOT_SAMPLED,
    START,
    DroppedRollout,
    Probe,
    Prompt,
    Rollout,
    RolloutGroup,
    StopReason,
    Version,
    WeightVersion,
)
from rlsys.rollout.play import Member, Player, opening_tokens
from rlsys.rollout.vllm_settings import engine_environment
from rlsys.train.learner import LearnerRank
from rlsys.train.logprobs import token_logprobs
from rlsys.train.model import load_model
from rlsys.weights.probe import probe_sequences
from rlsys.weights.segment import SegmentWriter
from rlsys.weights.tcp import free_port

Side = Literal["engine", "learner"]
SIDES: tuple[Side, ...] = get_args(Side)
TIMEOUT_S = 900.0  # for one of the waits for a process
POLL_S = 0.02
# files of a measurement, each in the folder of its process
CONFIG, READY, GO, SECONDS, ENOUGH = "config.json", "ready", "go", "seconds", "enough"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """Where a side computes, and how it is given its work.

    Attributes:
        which: numbers of its cores, counted from the first one that this process may use.
        threads: of its libraries.
        by_batch: whether the engine has sampled a batch to its end before it is given the next one.
    """

    which: tuple[int, ...]
    threads: int
    by_batch: bool


def measure_sides(sides: Mapping[Side, Cores], config: Config, model_path: Path, *, folder: Path) -> dict[Side, float]:
    """Wall seconds of each side for the batches of the list of ``config``, start-up left out. They begin at once, and
    who is done goes on with the same work until all are, so that nobody is measured beside an idle core.

    Args:
        folder: for the files of this measurement; is made.

    Raises:
        RlsysError: one of them failed; with its last words.
        WaitTimeout: one of them did not get on in time.
    """
    folder.mkdir()
    with ExitStack() as stack:
        started = [
            stack.enter_context(_started(side, cores, config, model_path, folder=folder / side))
            for side, cores in sides.items()
        ]
        for process in started:
            process.wait_for(READY)
        for process in started:
            (process.folder / GO).touch()
        for process in started:
            process.wait_for(SECONDS)
        for process in started:
            (process.folder / ENOUGH).touch()
        return {process.side: float((process.folder / SECONDS).read_text(encoding="utf-8")) for process in started}


@contextmanager
def on_cores(which: Sequence[int]) -> Iterator[None]:
    """What is started meanwhile keeps to these cores: an engine has more than one process, and every library has
    threads of its own.

    Args:
        which: as in ``Cores``.

    Raises:
        ConfigError: there are not so many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) <= max(which):
        raise ConfigError(
            "cores of this machine",
            got=str(len(allowed)),
            wanted=str(max(which) + 1),
            remedy="measure on a larger machine",
        )
    os.sched_setaffinity(0, {allowed[number] for number in which})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Process:
    side: Side
    folder: Path
    process: subprocess.Popen[bytes]

    def wait_for(self, name: str) -> None:
        deadline = monotonic() + TIMEOUT_S
        while not (self.folder / name).exists():
            if self.process.poll() is not None:
                said = (self.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
                cause = said[-1] if said else f"status {self.process.returncode}"
                raise RlsysError(f"the {self.side} by itself failed: {cause}")
            if monotonic() > deadline:
                raise WaitTimeout(f"the {self.side} by itself to be {name}", TIMEOUT_S)
            sleep(POLL_S)


@contextmanager
def _started(side: Side, cores: Cores, config: Config, model_path: Path, *, folder: Path) -> Iterator[_Process]:
    folder.mkdir()
    (folder / CONFIG).write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", __name__, side, str(folder), str(model_path), str(int(cores.by_batch))]
    environment = os.environ | engine_environment(cpus=cores.threads, gpus=0)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        with on_cores(cores.which):
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield _Process(side=side, folder=folder, process=process)
            process.wait(TIMEOUT_S)
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()


# --- in the process of one side --------------------------------------------------------------------------------------


def main(side: Side, folder: Path, model_path: Path, by_batch: bool) -> None:
    config = Config.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    inputs = inputs_of(config, model_path)
    batches = batches_of(config, inputs)
    if side == "engine":
        together = [[batch] for batch in batches] if by_batch else [batches]
        asyncio.run(_sample_all(config, inputs, together, folder))
    else:
        _train_all(config, inputs, batches, folder)


def _begin(folder: Path) -> float:
    """Say that all is ready, and wait for the start. Returns when it was, as ``perf_counter`` tells it."""
    (folder / READY).touch()
    deadline = monotonic() + TIMEOUT_S
    while not (folder / GO).exists():
        if monotonic() > deadline:
            raise WaitTimeout("the start of the measurement", TIMEOUT_S)
        sleep(POLL_S)
    return perf_counter()


def _end(folder: Path, began: float) -> Callable[[], bool]:
    """Hand in the seconds since ``began``. Returns whether the measurement is over, to be asked until it is."""
    written = folder / f"{SECONDS}.part"
    written.write_text(str(perf_counter() - began), encoding="utf-8")
    written.rename(folder / SECONDS)
    return lambda: (folder / ENOUGH).exists() or perf_counter() - began > TIMEOUT_S


async def _sample_all(
    config: Config, inputs: Inputs, together: Sequence[Sequence[Sequence[Prompt]]], folder: Path
) -> None:
    """``together``: batches that are given to the engine at once, and what comes when all of them are done."""
    from rlsys.rollout.vllm_engine import VllmEngine

    settings = replace(engine_settings(config, inputs, 0), timeout_s=TIMEOUT_S)
    engine = FixedLengths(VllmEngine("alone", settings))
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_path)
    player = Player(engine, "alone", make_env=SingleTurn, tokenizer=tokenizer, clock=WallClock())
    plan = make_plan(config)
    in_hand = asyncio.Semaphore(plan.slots)

    async def play(prompt: Prompt, member: Member) -> None:
        async with in_hand:
            ended = await player.play_rollout(prompt, member, plan.spec)
        if isinstance(ended, DroppedRollout):
            raise RlsysError(f"{ended.rollout_id} was dropped: {ended.cause.value} {ended.detail}")

    async def play_all(some: Sequence[Sequence[Prompt]]) -> None:
        ordered = [
            (prompt, member) for prompts in some for prompt in prompts for member, _ in members_of(prompt, config)
        ]
        await asyncio.gather(*(play(prompt, member) for prompt, member in ordered))

    await engine.start()
    try:
        await engine.load_weights(_weights(inputs.model_path, folder / "weights"))
        await play_all(together[0][:1])  # in a run the evaluation before the training warms the engine up
        began = _begin(folder)
        for batches in together:
            await play_all(batches)
        is_over = _end(folder, began)
        while not is_over():
            await play_all(together[0][:1])
    finally:
        await engine.stop()


def _weights(model_path: str, segment: Path) -> WeightVersion:
    """The model's own weights, as a version that the engine proves."""
    model = load_model(model_path)
    writer = SegmentWriter(segment, torch.float32)
    writer.write(dict(model.named_parameters()))  # a tied head is no parameter of its own
    sequences = probe_sequences(model.config.vocab_size, seed=0)
    tokens = torch.from_numpy(np.stack(sequences)).long()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        logprobs = token_logprobs(logits, tokens, positions, temperature=1.0).logprobs
    return WeightVersion(
        version=START,
        segment=str(segment),
        tensors=writer.finish(),
        probe=Probe(token_ids=sequences, logprobs=tuple(logprobs.numpy())),
        previous_probe=None,
    )


def _train_all(config: Config, inputs: Inputs, batches: Sequence[Sequence[Prompt]], folder: Path) -> None:
    learner = LearnerRank(
        model_path=inputs.model_path,
        train=config.train,
        temperature=config.rollout.temperature,
        objective=objective_of(config),
        seed=config.run.seed,
    )
    learner.start(0, 1, "127.0.0.1", free_port("127.0.0.1"))
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_path)
    samples = [
        make_batch(config, inputs, 0, [_answered(prompt, config, tokenizer, step) for prompt in prompts], step)
        for step, prompts in enumerate(batches)
    ]
    began = _begin(folder)
    for batch in samples:  # the first one is slower, here as in a run
        learner.step(batch.for_rank(0))
    is_over = _end(folder, began)
    while not is_over():
        learner.step(samples[0].for_rank(0))
    learner.stop()


def _answered(prompt: Prompt, config: Config, tokenizer: Any, step: int) -> RolloutGroup:
    """A question with random answers of the right lengths, as the very policy that is trained would have given them."""
    opening, version = opening_tokens(tokenizer, prompt.content), Version(incarnation=0, step=step)
    rollouts = []
    for index, (member, length) in enumerate(members_of(prompt, config)):
        answer_T = np.random.default_rng([step, index, length]).integers(0, len(tokenizer), size=length)
        is_sampled_T = np.repeat([False, True], [len(opening), length])
        rollouts.append(
            Rollout(
                rollout_id=member.rollout_id(prompt.group_id),
                token_ids_T=np.concatenate([opening, answer_T]).astype(np.int32),
                loss_mask_T=is_sampled_T,
                behaviour_logprobs_T=np.where(is_sampled_T, -math.log(len(tokenizer)), 0.0).astype(np.float32),
                versions_T=np.where(is_sampled_T, version.code, NOT_SAMPLED),
                num_prompt_tokens=len(opening),
                completion="",
                stop_reason=StopReason.LENGTH,
                engine="none",
                seconds=0.0,
                reward=float(index % 2),
            )
        )
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


if __name__ == "__main__":
    which, folder_name, model_name, one_by_one = sys.argv[1:]
    main(which, Path(folder_name), Path(model_name), one_by_one == "1")  # type: ignore[arg-type]
