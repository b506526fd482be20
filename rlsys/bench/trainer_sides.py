"""What the trainer's bench compares, each in processes of its own that wait for their turn: the learner on one or more
ranks, a bare DeepSpeed loop over the same microbatches, and a plain loop of transformers."""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from rlsys.algo import CORRECTIONS, POLICY_LOSSES
from rlsys.batch.tensors import RankBatch
from rlsys.bench.trainer_batches import Sizes, make_samples, packed, padded, skewed_lengths
from rlsys.config.schema import TrainSection
from rlsys.errors import RlsysError, WaitTimeout
from rlsys.models.shape import shape_of
from rlsys.train import parallel
from rlsys.train.deepspeed_config import deepspeed_config
from rlsys.train.head import LeanHead
from rlsys.train.learner import LearnerRank
from rlsys.train.logprobs import logprobs_by
from rlsys.train.model import load_model
from rlsys.train.objective import Objective
from rlsys.weights.tcp import free_port

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LR = 1e-6
TIMEOUT_S = 900.0

Work = Literal["packed", "padded", "rows", "one_row"]
Runs = dict[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What is measured.

    Attributes:
        kind: ours, the bare loop, the plain loop of transformers, or that one with our head.
        ranks, threads: processes, and threads of each.
    """

    kind: Literal["ours", "bare", "naive", "lean"]
    dtype: Literal["float32", "bfloat16"] = "float32"
    ranks: int = 1
    threads: int = 2


class Running:
    """The processes of a side."""

    def __init__(self, side: Side, model_path: str, sizes: Sizes) -> None:
        context = mp.get_context("spawn")
        self._side, self._pipes, self._processes = side, [], []
        port = free_port("127.0.0.1")
        for rank in range(side.ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, side, rank, port, model_path, sizes), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def seconds(self, work: Work) -> float:
        """Of one step, on the rank that took longest.

        Raises:
            RlsysError: a process failed; with its traceback.
            WaitTimeout: it did not answer in time.
        """
        for pipe in self._pipes:
            pipe.send(work)
        return max(self._answer(rank) for rank in range(len(self._pipes)))

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _answer(self, rank: int) -> float:
        pipe = self._pipes[rank]
        if not pipe.poll(TIMEOUT_S):
            raise WaitTimeout(f"rank {rank} of {self._side}", TIMEOUT_S)
        try:
            answer = pipe.recv()
        except EOFError as error:
            raise RlsysError(f"rank {rank} of {self._side} died") from error
        if isinstance(answer, str):
            raise RlsysError(f"rank {rank} of {self._side} failed:\n{answer}")
        return float(answer)


@contextmanager
def running(side: Side, model_path: str, sizes: Sizes) -> Iterator[Running]:
    processes = Running(side, model_path, sizes)
    try:
        yield processes
    finally:
        processes.stop()


def _serve(pipe: Any, side: Side, rank: int, port: int, model_path: str, sizes: Sizes) -> None:
    try:
        torch.set_num_threads(side.threads)
        make = {"ours": _ours, "bare": _bare, "naive": _naive, "lean": _naive}[side.kind]
        runs = make(side, rank, port, model_path, sizes)
        while True:
            run = runs[pipe.recv()]
            began = perf_counter()
            run()
            pipe.send(perf_counter() - began)
    except EOFError:
        return  # whoever measured is gone
    except Exception:  # the boundary of the process: who asked shows the traceback
        pipe.send(traceback.format_exc())


def section(side: Side, sizes: Sizes) -> TrainSection:
    """The learner's, with what a run has where nothing is set, but for the precision."""
    return TrainSection(
        ranks=side.ranks,
        zero_stage=1 if side.ranks > 1 else 0,
        lr=LR,
        tokens_per_microbatch=sizes.tokens_per_microbatch,
        dtype=side.dtype,
    )


def _ours(side: Side, rank: int, port: int, model_path: str, sizes: Sizes) -> Runs:
    objective = Objective(loss=POLICY_LOSSES["ppo_clip"], correction=CORRECTIONS["tis"])
    learner = LearnerRank(
        model_path=model_path,
        train=section(side, sizes),
        temperature=1.0,
        objective=objective,
        seed=0,
        threads=side.threads,
    )
    learner.start(rank, side.ranks, "127.0.0.1", port)
    batches = _batches(model_path, sizes, rank, side.ranks)
    return {work: partial(learner.step, batch) for work, batch in batches.items()}


def _batches(model_path: str, sizes: Sizes, rank: int, ranks: int) -> dict[str, RankBatch]:
    shape = shape_of(model_path)
    skewed = make_samples(skewed_lengths(sizes), shape.vocab_size)
    even = make_samples([sizes.row_tokens] * sizes.rows, shape.vocab_size)
    batches = {
        work: packed(samples, sizes, shape.token_cost, ranks).for_rank(rank)
        for work, samples in (("packed", skewed), ("rows", even))
    }
    return batches if ranks > 1 else {**batches, "padded": padded(skewed, sizes)}


def _bare(side: Side, rank: int, port: int, model_path: str, sizes: Sizes) -> Runs:
    """Forward, log-probabilities, backward and step of DeepSpeed's engine, and nothing around them."""
    deepspeed = parallel.load_deepspeed("cpu")
    parallel.join(
        deepspeed,
        device="cpu",
        rank=rank,
        world_size=1,
        master_addr="127.0.0.1",
        master_port=port,
        timeout_s=TIMEOUT_S,
    )
    model = load_model(model_path)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=deepspeed_config(section(side, sizes), device="cpu")
    )
    head = LeanHead(engine.module.get_output_embeddings())

    def step(batch: RankBatch) -> None:
        (part,) = batch.parts
        for number, microbatch in enumerate(part.microbatches, start=1):
            result = logprobs_by(engine, head, microbatch.token_ids, microbatch.position_ids, temperature=1.0)
            loss = -(result.logprobs * microbatch.advantages).sum() / part.num_weighted_tokens
            engine.set_gradient_accumulation_boundary(number == len(part.microbatches))
            engine.backward(loss)
        engine.step()

    batches = _batches(model_path, sizes, rank, 1)
    return {work: partial(step, batch) for work, batch in batches.items()}


def _naive(side: Side, rank: int, port: int, model_path: str, sizes: Sizes) -> Runs:
    """All sequences in one row whose positions restart, or each in a row of its own; the softmax of the whole logits in
    float32, or our head; AdamW of torch."""
    model = load_model(model_path).to(DTYPES[side.dtype])
    head = LeanHead(model.get_output_embeddings()) if side.kind == "lean" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    (part,) = _batches(model_path, sizes, 0, 1)["rows"].parts
    token_ids = torch.cat([microbatch.token_ids for microbatch in part.microbatches])
    advantages = torch.cat([microbatch.advantages for microbatch in part.microbatches])
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)

    def step(shape: tuple[int, int]) -> None:
        def laid(tensor: Tensor) -> Tensor:
            return tensor.reshape(shape)

        if head is None:
            logits = model(input_ids=laid(token_ids), position_ids=laid(positions), use_cache=False).logits
            logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            taken = logprobs.gather(2, laid(token_ids)[:, 1:, None]).squeeze(2)
        else:
            taken = logprobs_by(model, head, laid(token_ids), laid(positions), temperature=1.0).logprobs[:, 1:]
        (-(taken * laid(advantages)[:, 1:]).sum() / part.num_weighted_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    rows, length = token_ids.shape
    return {"one_row": partial(step, (1, rows * length)), "rows": partial(step, (rows, length))}
