"""One side of a run alone, on so many cores: how long the engine takes to sample a list of rollouts with its slots
full, or the learner to train it. In a process of its own, because libraries read their number of threads when they are
imported: ``seconds_alone`` starts one."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

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

Side = Literal["engine", "learner"]
TIMEOUT_S = 900.0
CONFIG, SECONDS = "config.json", "seconds"


def seconds_alone(side: Side, config: Config, model_path: Path, *, part: range, cores: int, folder: Path) -> float:
    """Wall seconds for some batches of the list of ``config``, start-up left out.

    Args:
        part: their numbers.
        folder: for the files of this measurement; is made.

    Raises:
        RlsysError: it failed; with its last words.
        WaitTimeout: it did not end in time.
    """
    folder.mkdir()
    (folder / CONFIG).write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", __name__, side, str(folder), str(model_path), str(part.start), str(part.stop)]
    environment = os.environ | engine_environment(cpus=cores, gpus=0)
    with (folder / "log.txt").open("w", encoding="utf-8") as log, on_cores(cores):
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise WaitTimeout(f"the {side} alone on {cores} cores", TIMEOUT_S) from error
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
    if status != 0:
        said = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
        raise RlsysError(f"the {side} alone on {cores} cores failed: {said[-1] if said else f'status {status}'}")
    return float((folder / SECONDS).read_text(encoding="utf-8"))


@contextmanager
def on_cores(cores: int) -> Iterator[None]:
    """What is started meanwhile keeps to so many cores: an engine has more than one process, and every library has
    threads of its own.

    Raises:
        ConfigError: there are not so many.
    """
    allowed = os.sched_getaffinity(0)
    if len(allowed) < cores:
        raise ConfigError(
            "cores of this machine", got=str(len(allowed)), wanted=str(cores), remedy="measure on a larger machine"
        )
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def main(side: Side, folder: Path, model_path: Path, part: slice) -> None:
    config = Config.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    inputs = inputs_of(config, model_path)
    batches = batches_of(config, inputs)[part]
    if side == "engine":
        seconds = asyncio.run(_sample_all(config, inputs, batches, folder))
    else:
        seconds = _train_all(config, inputs, batches)
    (folder / SECONDS).write_text(str(seconds), encoding="utf-8")


async def _sample_all(config: Config, inputs: Inputs, batches: Sequence[Sequence[Prompt]], folder: Path) -> float:
    from rlsys.rollout.vllm_engine import VllmEngine

    settings = replace(engine_settings(config, inputs, 0), timeout_s=TIMEOUT_S)
    engine = FixedLengths(VllmEngine("alone", settings))
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_path)
    player = Player(engine, "alone", make_env=SingleTurn, tokenizer=tokenizer, clock=WallClock())
    spec, slots = make_plan(config).spec, asyncio.Semaphore(settings.slots)

    async def play(prompt: Prompt, member: Member) -> None:
        async with slots:
            ended = await player.play_rollout(prompt, member, spec)
        if isinstance(ended, DroppedRollout):
            raise RlsysError(f"{ended.rollout_id} was dropped: {ended.cause.value} {ended.detail}")

    await engine.start()
    try:
        await engine.load_weights(_weights(inputs.model_path, folder / "weights"))
        # in a run the evaluation before the training warms the engine up
        await asyncio.gather(*(play(prompt, Member(name="warm-up")) for prompt in batches[0]))
        began = perf_counter()
        await asyncio.gather(
            *(
                play(prompt, member)
                for prompts in batches
                for prompt in prompts
                for member, _ in members_of(prompt, config)
            )
        )
        return perf_counter() - began
    finally:
        await engine.stop()


def _weights(model_path: str, segment: Path) -> WeightVersion:
    """The model's own weights, as a version that the engine proves."""
    model = load_model(model_path)
    writer = SegmentWriter(segment, torch.float32)
    for name, parameter in model.named_parameters():  # a tied head is no parameter of its own
        writer.write(name, parameter)
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


def _train_all(config: Config, inputs: Inputs, batches: Sequence[Sequence[Prompt]]) -> float:
    learner = LearnerRank(
        model_path=inputs.model_path,
        train=config.train,
        temperature=config.rollout.temperature,
        objective=objective_of(config),
        seed=config.run.seed,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    learner.start(0, 1, "127.0.0.1", port)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_path)
    samples = [
        make_batch(config, inputs, 0, [_answered(prompt, config, tokenizer, step) for prompt in prompts], step)
        for step, prompts in enumerate(batches)
    ]
    began = perf_counter()
    for batch in samples:  # the first one is slower, here as in a run
        learner.step(batch.for_rank(0))
    seconds = perf_counter() - began
    learner.stop()
    return seconds


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
    which, folder_name, model_name, start, stop = sys.argv[1:]
    main(which, Path(folder_name), Path(model_name), slice(int(start), int(stop)))  # type: ignore[arg-type]
