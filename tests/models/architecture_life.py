"""The life of a model through every real part: learner, weight segment, engine, play, saving.

Lives are lived one after another in a few processes, so that what is slow to import is imported once in each.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from rlsys.algo.advantages import grpo
from rlsys.algo.corrections import tis
from rlsys.algo.losses import ppo_clip
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.batch.tensors import RankBatch
from rlsys.config.schema import TrainSection
from rlsys.envs.single_turn import SingleTurn
from rlsys.records import Draw, LoadReport, Probe, Prompt, Rollout, RolloutGroup, Version, WeightVersion
from rlsys.rollout.play import Player, PlaySpec
from rlsys.rollout.vllm_settings import VllmSettings, engine_environment
from rlsys.weights.owner import end_with_owner
from rlsys.weights.probe import probe_sequences
from rlsys.weights.segment import SegmentWriter, segment_path
from rlsys.weights.tcp import free_port
from tests.models.tiny_architectures import MAX_POSITIONS

DEADLINE_S = 240.0
# the second is so much longer that two rollouts of the first share a row of its length
PROMPTS = ("1+2=", "Which one is the larger, four or seven? Write it as one word: ok")
GROUP_SIZE = 6
MAX_TOKENS = 32
TOKENS_PER_MICROBATCH = 4096  # so many that further microbatches would cost more than shared rows
LEARNING_RATE = 2e-2  # Adam: so much does every weight move in a step


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """What a life showed.

    Attributes:
        loads: of version 0 and of version 2.
        before, after: rollouts sampled under version 0 and under version 2.
        learner_logprobs: the learner's at version 2 of the rollouts of ``after``.
        metrics: of the two training steps.
        num_shared_rows: rows of a training step that hold several rollouts.
        probes: at version 0 and at version 2.
    """

    loads: tuple[LoadReport, LoadReport]
    before: list[Rollout]
    after: list[Rollout]
    learner_logprobs: list[np.ndarray]
    metrics: list[dict[str, float]]
    num_shared_rows: int
    probes: tuple[Probe, Probe]


class Lives:
    """Processes that live the lives they are sent, as many at once as there are processes."""

    def __init__(self, num_processes: int) -> None:
        self._processes = [_Process() for _ in range(num_processes)]
        self._threads = [ThreadPoolExecutor(max_workers=1) for _ in self._processes]
        self._next = cycle(zip(self._threads, self._processes, strict=True))

    def begin(self, folder: Path, saved: Path, zero_stage: int) -> Future[Life]:
        """The life of the model in ``folder``; the trained one is written to ``saved``."""
        thread, process = next(self._next)
        return thread.submit(process.live, folder, saved, zero_stage)

    def stop(self) -> None:
        for thread, process in zip(self._threads, self._processes, strict=True):
            thread.shutdown(cancel_futures=True)
            process.stop()


class _Process:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, os.getpid()))  # no daemon: engines are its children
        self._process.start()
        there.close()

    def live(self, folder: Path, saved: Path, zero_stage: int) -> Life:
        self._pipe.send((folder, saved, zero_stage))
        if not self._pipe.poll(DEADLINE_S):
            self._process.kill()
            raise TimeoutError(f"the life of {folder.name} did not end in {DEADLINE_S} s")
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"the life of {folder.name} broke off:\n{answer}")
        return answer

    def stop(self) -> None:
        self._pipe.close()  # the process ends at the end of its pipe
        self._process.join(30.0)
        self._process.kill()


def _serve(pipe: Any, owner: int) -> None:
    end_with_owner(owner)
    os.environ.update(engine_environment(cpus=1, gpus=0))
    with asyncio.Runner() as runner:
        while True:
            try:
                folder, saved, zero_stage = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(runner.run(_life(folder, saved, zero_stage)))
            except Exception:  # the boundary of the process: the test shows the traceback
                pipe.send(traceback.format_exc())


async def _life(folder: Path, saved: Path, zero_stage: int) -> Life:
    from rlsys.rollout.vllm_engine import VllmEngine  # reads the environment when it is imported

    tokenizer = AutoTokenizer.from_pretrained(folder)
    publisher = _Publisher(folder, zero_stage)
    engine = VllmEngine(
        "rollout-0",
        VllmSettings(
            model=str(folder),
            dtype="float32",
            max_model_len=MAX_POSITIONS,
            slots=16,
            seed=0,
            start_timeout_s=DEADLINE_S,
            timeout_s=60,
        ),
    )
    try:
        await engine.start()
        first = publisher.publish(0)
        loads = [await engine.load_weights(first)]
        groups = await _play(engine, tokenizer, step=0)
        batches = [_batch(groups, step) for step in (0, 1)]
        metrics = [publisher.learner.step(batch) for batch in batches]
        second = publisher.publish(2, previous=first.probe)
        loads.append(await engine.load_weights(second))
        after = _rollouts(await _play(engine, tokenizer, step=2))
        logprobs = publisher.learner.probe_logprobs([rollout.token_ids_T for rollout in after])
        publisher.learner.save_hf(str(saved))
    finally:
        publisher.stop()
        await engine.stop()
    return Life(
        loads=(loads[0], loads[1]),
        before=_rollouts(groups),
        after=after,
        learner_logprobs=logprobs,
        metrics=metrics,
        num_shared_rows=_num_shared_rows(batches[0]),
        probes=(first.probe, second.probe),
    )


class _Publisher:
    """A learner of one rank, and the segment it writes to."""

    def __init__(self, folder: Path, zero_stage: int) -> None:
        from rlsys.train.learner import LearnerRank
        from rlsys.train.objective import Objective

        self.learner = LearnerRank(
            model_path=str(folder),
            train=TrainSection(zero_stage=zero_stage, lr=LEARNING_RATE, timeout_s=60.0),
            temperature=1.0,
            objective=Objective(loss=ppo_clip, correction=partial(tis, cap=2.0)),
            seed=0,
            threads=1,
        )
        port = free_port("127.0.0.1")
        self.learner.start(0, 1, "127.0.0.1", port)
        self._path = segment_path(folder.name, "0")
        self._writer = SegmentWriter(self._path, torch.float32)
        self._tokens = probe_sequences(self.learner.vocab_size, seed=0)

    def publish(self, step: int, previous: Probe | None = None) -> WeightVersion:
        self.learner.export(self._writer.write)
        return WeightVersion(
            version=Version(incarnation=0, step=step),
            segment=str(self._path),
            tensors=self._writer.finish(),
            probe=Probe(token_ids=self._tokens, logprobs=tuple(self.learner.probe_logprobs(self._tokens))),
            previous_probe=previous,
        )

    def stop(self) -> None:
        self.learner.stop()
        self._path.unlink(missing_ok=True)


async def _play(engine: Any, tokenizer: Any, step: int) -> list[RolloutGroup]:
    spec = PlaySpec(group_size=GROUP_SIZE, temperature=1.0, max_tokens=MAX_TOKENS, seed=step)
    prompts = [
        Prompt(draw=Draw(source="test", index=index, epoch=0), content=content) for index, content in enumerate(PROMPTS)
    ]
    player = Player(engine, "rollout-0", make_env=SingleTurn, tokenizer=tokenizer, clock=_WallClock())

    async def play(prompt: Prompt) -> RolloutGroup:
        ended = await asyncio.gather(*(player.play_rollout(prompt, member, spec) for member in spec.members))
        return RolloutGroup(prompt=prompt, rollouts=tuple(one for one in ended if isinstance(one, Rollout)))

    return list(await asyncio.gather(*map(play, prompts)))


class _WallClock:
    def now(self) -> float:
        return perf_counter()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _batch(groups: Sequence[RolloutGroup], step: int) -> RankBatch:
    """Rewards 0, 1, 0, 1 ... in each group."""
    scored = [
        replace(
            group,
            rollouts=tuple(replace(rollout, reward=float(member % 2)) for member, rollout in enumerate(group.rollouts)),
        )
        for group in groups
    ]
    return pack(
        build(scored, advantage=grpo, oldest_step=None, correct_at=1.0),
        ranks=1,
        steps_per_batch=1,
        tokens_per_microbatch=TOKENS_PER_MICROBATCH,
        pad_token_id=0,
        version=Version(incarnation=0, step=step),
    ).for_rank(0)


def _num_shared_rows(batch: RankBatch) -> int:
    microbatches = [microbatch for part in batch.parts for microbatch in part.microbatches]
    rows = Counter((index, segment.row) for index, mb in enumerate(microbatches) for segment in mb.segments)
    return sum(held > 1 for held in rows.values())


def _rollouts(groups: Sequence[RolloutGroup]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]
