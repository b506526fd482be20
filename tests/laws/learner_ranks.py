"""Two real processes in which learner ranks live, a tiny model, and rollouts for it."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlsys.algo.corrections import tis
from rlsys.algo.losses import ppo_clip
from rlsys.batch.tensors import RankBatch
from rlsys.config.schema import TrainSection
from rlsys.errors import Diverged
from rlsys.records import NOT_SAMPLED, Draw, Prompt, Rollout, RolloutGroup, StopReason, Version
from rlsys.train.critic import CriticPlan
from rlsys.train.objective import Objective
from rlsys.weights.tcp import free_port

OBJECTIVE = Objective(loss=ppo_clip, correction=partial(tis, cap=2.0))
VOCABULARY = 128
TEMPERATURE = 0.7
DEADLINE_S = 180.0


def make_model(folder: Path) -> str:
    """A random Qwen2 with a tied head; the spread of its weights is large enough that attention matters."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_groups(version: Version) -> list[RolloutGroup]:
    """Four groups of three: lengths 8 to 59, tokens of this version and of two before it, one dropped reward each."""
    rng = np.random.default_rng(0)
    groups = []
    for index in range(4):
        prompt = Prompt(draw=Draw(source="test", index=index, epoch=0), content="")
        rollouts = []
        for member in range(3):
            length, num_prompt = int(rng.integers(8, 60)), int(rng.integers(1, 6))
            sampled = np.arange(length) >= num_prompt
            steps = version.step - rng.integers(0, 3, length)
            rollouts.append(
                Rollout(
                    rollout_id=f"{prompt.group_id}/{member}",
                    token_ids_T=rng.integers(0, VOCABULARY, length).astype(np.int32),
                    loss_mask_T=sampled,
                    behaviour_logprobs_T=np.where(sampled, rng.normal(-5.0, 1.0, length), 0.0).astype(np.float32),
                    versions_T=np.where(sampled, steps, NOT_SAMPLED).astype(np.int64),
                    num_prompt_tokens=num_prompt,
                    completion="",
                    stop_reason=StopReason.EOS,
                    engine="test",
                    seconds=0.0,
                    reward=float(rng.integers(0, 2)) + member / 4,
                )
            )
        groups.append(RolloutGroup(prompt=prompt, rollouts=tuple(rollouts), dropped_rewards=(0.25,)))
    return groups


def take_copies(weights: dict[str, np.ndarray], bucket: Mapping[str, torch.Tensor]) -> None:
    """What ``LearnerRank.export`` may write to."""
    weights.update({name: tensor.float().numpy().copy() for name, tensor in bucket.items()})


def is_time(name: str) -> bool:
    """Whether a metric is of the machine's time, and so another one on every rank and in every run."""
    return name.startswith("timing_s/") or name == "perf/mfu"


def is_of_layout(name: str) -> bool:
    """Whether a metric is another one where a batch is spread otherwise, or in other time."""
    return is_time(name) or name == "perf/balance"


def section(zero_stage: int, ranks: int, **keys: Any) -> TrainSection:
    """Plain SGD without clipping, so that a step's gradient can be read from the weights."""
    deepspeed: dict[str, Any] = {}
    if zero_stage == 3:
        deepspeed["zero_optimization"] = {"stage3_param_persistence_threshold": 0}
    defaults = {"optimizer": {"name": "sgd"}, "lr": 64.0, "max_grad_norm": 0.0, "timeout_s": 60.0}
    return TrainSection.model_validate(
        {"zero_stage": zero_stage, "ranks": ranks, "deepspeed": deepspeed, **defaults, **keys}
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one rank reports. ``before``, ``after``: the exported weights, empty except on rank 0."""

    metrics: list[dict[str, float]]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    probe: list[np.ndarray]
    diverged: str | None


def train_rank(
    *,
    rank: int,
    world_size: int,
    port: int,
    model_path: str,
    train: TrainSection,
    batches: Sequence[RankBatch],
    objective: Objective = OBJECTIVE,
    critic: CriticPlan | None = None,
    batches_of_run: int = 1,
    probe: Sequence[np.ndarray] = (),
    save_to: str | None = None,
) -> Outcome:
    """A learner rank's life: start, train ``batches``, export, save, stop."""
    from rlsys.train.learner import LearnerRank

    learner = LearnerRank(
        model_path=model_path,
        train=train,
        temperature=TEMPERATURE,
        objective=objective,
        critic=critic,
        batches=batches_of_run,
        seed=0,
        threads=1,
    )
    before: dict[str, np.ndarray] = {}
    after: dict[str, np.ndarray] = {}
    metrics: list[dict[str, float]] = []
    diverged = None
    try:
        learner.start(rank, world_size, "127.0.0.1", port)
        assert learner.vocab_size >= VOCABULARY
        learner.export(partial(take_copies, before))
        try:
            metrics.extend(learner.step(batch) for batch in batches)
        except Diverged as error:
            diverged = str(error)
        learner.export(partial(take_copies, after))
        logprobs = learner.probe_logprobs(probe) if probe else []
        if save_to:
            learner.save_hf(save_to)
            learner.save_adapter(f"{save_to}-adapter")
    finally:
        learner.stop()  # after a failure too, or the next order would find the old process group
    return Outcome(metrics=metrics, before=before, after=after, probe=logprobs, diverged=diverged)


class Ranks:
    """Up to ``number`` processes, each of which runs what it is sent; imports are paid once."""

    def __init__(self, number: int = 2) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(number):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, world_size: int, batches: Callable[[int], Sequence[RankBatch]], **keys: Any) -> list[Outcome]:
        """``train_rank`` on ``world_size`` processes at once; ``batches(rank)``: what a data-parallel rank trains."""
        port = free_port("127.0.0.1")
        parts = keys["train"].processes // keys["train"].ranks  # processes in a row that are one data-parallel rank
        for rank, pipe in enumerate(self._pipes[:world_size]):
            pipe.send(dict(rank=rank, world_size=world_size, port=port, batches=batches(rank // parts), **keys))
        return [self._receive(rank) for rank in range(world_size)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _receive(self, rank: int) -> Outcome:
        if not self._pipes[rank].poll(DEADLINE_S):
            raise TimeoutError(f"rank {rank} did not answer in {DEADLINE_S} s")
        answer = self._pipes[rank].recv()
        if isinstance(answer, str):
            raise RuntimeError(f"rank {rank} failed:\n{answer}")
        return answer


def _serve(pipe: Any) -> None:
    while True:
        order = pipe.recv()
        try:
            pipe.send(train_rank(**order))
        except Exception:  # the boundary of the process: the test shows the traceback
            pipe.send(traceback.format_exc())
