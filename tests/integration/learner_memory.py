"""The peak memory of a learner that takes real steps. Each case in a child of one process that has imported what all of
them need, so that a peak is that of one case alone."""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.batch.cost import BY_TOKENS
from rlsys.bench.trainer_batches import Sizes, make_samples, packed
from rlsys.config.schema import TrainSection
from rlsys.weights.tcp import free_port

DEADLINE_S = 400.0
VOCABULARY, LENGTH = 4096, 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A Llama of this size, and two microbatches of this many tokens."""

    width: int
    layers: int
    tokens: int
    train: TrainSection


def make_model(case: Case, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        num_key_value_heads=case.width // 128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def peaks(cases: Sequence[Case], folders: Sequence[Path]) -> list[int]:
    """Bytes that were resident at most, of each case."""
    here, there = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_serve, args=(there, cases, folders))
    process.start()
    try:
        found = []
        for case in cases:
            if not here.poll(DEADLINE_S):
                raise TimeoutError(f"{case} did not end in {DEADLINE_S} s")
            answer = here.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"{case} failed:\n{answer}")
            found.append(answer)
        return found
    finally:
        process.kill()
        process.join()


def _serve(pipe: Any, cases: Sequence[Case], folders: Sequence[Path]) -> None:
    import transformers.models.llama  # noqa: F401  imported before the fork, as all the rest

    from rlsys.train import parallel

    parallel.load_deepspeed("cpu")
    for case, folder in zip(cases, folders, strict=True):
        child = os.fork()
        if child == 0:
            try:
                _step(case, str(folder))
                pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            except Exception:  # the boundary of the process: the test shows the traceback
                pipe.send(traceback.format_exc())
            os._exit(0)
        os.waitpid(child, 0)


def _step(case: Case, folder: str) -> None:
    from rlsys.algo import CORRECTIONS, POLICY_LOSSES
    from rlsys.train.learner import LearnerRank
    from rlsys.train.objective import Objective

    learner = LearnerRank(
        model_path=folder,
        train=case.train,
        temperature=1.0,
        objective=Objective(loss=POLICY_LOSSES["ppo_clip"], correction=CORRECTIONS["tis"]),
        seed=0,
        threads=1,
    )
    port = free_port("127.0.0.1")
    learner.start(0, 1, "127.0.0.1", port)
    samples = make_samples([LENGTH] * (2 * case.tokens // LENGTH), VOCABULARY)
    sizes = Sizes(
        is_tiny=True,
        sequences=len(samples),
        longest=LENGTH,
        tokens_per_microbatch=case.tokens,
        rows=1,
        row_tokens=2,
        repeats=1,
    )
    batch = packed(samples, sizes, BY_TOKENS).for_rank(0)
    learner.step(batch)
    learner.step(batch)  # the first one had no optimizer state beside its activations
