"""One rank of the learner: DeepSpeed around a Hugging Face model. A plain class; actors/ puts it into a process.

Legend: R rows, L tokens of a row.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.algo.measures import Mean, Measure, merge
from rlsys.algo.objective import RowsSettled
from rlsys.batch.tensors import Microbatch, RankBatch, RankPart
from rlsys.config.schema import TrainSection
from rlsys.errors import Diverged
from rlsys.records import Version
from rlsys.train import parallel
from rlsys.train.checkpoint import Layout, check_layout, load_state, save_state
from rlsys.train.deepspeed_config import deepspeed_config
from rlsys.train.export import full_weights
from rlsys.train.logprobs import TokenLogprobs, token_logprobs
from rlsys.train.model import load_model, save_model
from rlsys.train.objective import Objective


class LearnerRank:
    """Trains batches. ``start``, ``step``, ``export``, ``probe_logprobs``, ``save_hf``, ``save_checkpoint`` and
    ``stop`` are collectives: every rank calls them in the same order.

    Construction imports everything slow and meets nobody, so ranks are constructed first and then started together.

    Args:
        model_path: Hugging Face folder.
        train: its section of the configuration.
        temperature: what the engines sample with; logits are divided by it.
        objective: what is minimised.
        seed: of torch's generator.
        threads: CPU threads of this rank; None means OMP_NUM_THREADS, or torch's default without it.
    """

    def __init__(
        self,
        *,
        model_path: str,
        train: TrainSection,
        temperature: float,
        objective: Objective,
        seed: int,
        threads: int | None = None,
    ) -> None:
        threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self._model_path = model_path
        self._train = train
        self._temperature = temperature
        self._objective = objective
        self._device = "cuda" if train.gpus_per_rank > 0 else "cpu"
        self._deepspeed = parallel.load_deepspeed(self._device)
        self._engine: Any = None
        self._rank = 0
        self._world_size = 1

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the model; known once started."""
        return int(self._engine.module.config.get_text_config().vocab_size)

    def start(
        self, rank: int, world_size: int, master_addr: str, master_port: int, checkpoint: str | None = None
    ) -> None:
        """Meet the other ranks and bring DeepSpeed up, in the state of ``checkpoint`` where that is given.

        Args:
            checkpoint: folder of an earlier ``save_checkpoint``; None starts from the model.

        Raises:
            ConfigError: ``train.deepspeed`` contradicts us; or the checkpoint is of other ranks or another ZeRO stage
                (told before anything is loaded).
            CheckpointDamaged: there is no checkpoint in ``checkpoint``.
        """
        config = deepspeed_config(self._train, device=self._device)
        self._rank, self._world_size = rank, world_size
        if checkpoint is not None:
            check_layout(checkpoint, self._layout)
        parallel.join(
            self._deepspeed,
            device=self._device,
            rank=rank,
            world_size=world_size,
            master_addr=master_addr,
            master_port=master_port,
            timeout_s=self._train.timeout_s,
        )
        warm_up = functools.partial(_learning_rate_factor, warmup_steps=self._train.warmup_steps)
        schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=warm_up)
        self._engine, *_ = self._deepspeed.initialize(
            model=load_model(self._model_path),
            config=config,
            lr_scheduler=None if "scheduler" in config else schedule,
        )
        if checkpoint is not None:
            load_state(self._engine, checkpoint, rank=rank, device=self._device)

    @property
    def _layout(self) -> Layout:
        return Layout(ranks=self._world_size, zero_stage=self._train.zero_stage)

    def stop(self) -> None:
        """Let go of the model and of the other ranks; ``start`` may follow, with a new port."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = None
        gc.collect()  # the engine's hooks hold it in cycles
        parallel.leave(self._deepspeed)

    def step(self, batch: RankBatch) -> dict[str, float]:
        """Train one batch, one optimizer step per part. Returns the metrics, equal on every rank (times excepted).

        The proximal policy is the one before the first step. For the first part it is the detached training forward:
        exact, and free, unless the objective looks ahead. For the others it is a forward of their own before the first
        step, then frozen.

        Raises:
            Diverged: on every rank alike, before the weights take up a loss or gradient that is not finite.
        """
        began = time.perf_counter()
        is_free = not self._objective.looks_ahead
        proximal: list[list[Tensor] | None] = [
            None if is_free and part is batch.parts[0] else [self._no_grad_logprobs(mb) for mb in part.microbatches]
            for part in batch.parts
        ]
        measures: dict[str, Measure] = {}
        grad_norms = []
        learning_rate = 0.0
        for part, part_proximal in zip(batch.parts, proximal, strict=True):
            learning_rate = self._engine.get_lr()[0]
            own, grad_norm = self._train_part(part, part_proximal, batch.version, is_first=part is batch.parts[0])
            measures = merge(measures, own)
            grad_norms.append(grad_norm)
        return {
            **parallel.reduce(measures, self._device),
            "actor/grad_norm": sum(grad_norms) / len(grad_norms),
            "actor/lr": float(learning_rate),
            "perf/train_tokens": float(batch.num_tokens),
            "timing_s/update_actor": time.perf_counter() - began,
        }

    def export(self, write: Callable[[str, Tensor], None]) -> None:
        """Hand every full weight to ``write(name, tensor)``, on rank 0 only. A tensor is valid during the call."""
        stage = self._train.zero_stage
        for name, tensor in full_weights(self._engine.module, deepspeed=self._deepspeed, zero_stage=stage):
            if self._rank == 0:
                write(name, tensor)

    def save_hf(self, folder: str) -> None:
        """Write the model as a plain Hugging Face folder (rank 0 writes, every rank takes part)."""
        weights: dict[str, Tensor] = {}
        self.export(lambda name, tensor: weights.update({name: tensor.detach().to("cpu", copy=True)}))
        if self._rank == 0:
            save_model(self._engine.module, weights, self._model_path, folder)

    def save_checkpoint(self, folder: str) -> None:
        """Write everything that a later ``start`` needs to go on bit for bit. The files are there when it returns, not
        yet synced to the disk. Raises CheckpointFailed on every rank alike; the learner can go on."""
        save_state(self._engine, folder, rank=self._rank, layout=self._layout, device=self._device)

    def probe_logprobs(self, token_ids: Sequence[Sequence[int] | NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Log-probabilities of given sequences at temperature 1: for each float32 [T], 0 at its first token."""
        lengths = [len(ids) for ids in token_ids]
        tokens = torch.zeros((len(lengths), max(lengths)), dtype=torch.int64)
        for row, ids in enumerate(token_ids):
            tokens[row, : lengths[row]] = torch.as_tensor(np.asarray(ids, dtype=np.int64))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            rows = self._forward(tokens, positions, temperature=1.0).logprobs.cpu().numpy()
        return [rows[row, :length].copy() for row, length in enumerate(lengths)]

    def _train_part(
        self, part: RankPart, proximal: Sequence[Tensor] | None, version: Version, *, is_first: bool
    ) -> tuple[dict[str, Measure], float]:
        """One optimizer step. Returns its measures and its gradient norm (before clipping)."""
        inputs = [self._objective.inputs(microbatch, self._device) for microbatch in part.microbatches]
        if proximal is not None:
            for of_rows, logprobs in zip(inputs, proximal, strict=True):
                of_rows["proximal_logprobs_T"] = logprobs.reshape(-1)
        count, settled = self._look_ahead(part, inputs, is_first)
        scale = self._world_size / count  # DeepSpeed averages gradients over the ranks
        measures: dict[str, Measure] = {}
        is_finite = True
        last = len(part.microbatches) - 1
        for index, (microbatch, of_rows) in enumerate(zip(part.microbatches, inputs, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == last)
            loss_sum, own = self._train_microbatch(microbatch, of_rows, settled)
            is_finite = is_finite and bool(torch.isfinite(loss_sum))
            self._engine.backward(loss_sum * scale, scale_wrt_gas=False)
            measures = merge(measures, own)
        if parallel.on_any_rank(not is_finite, self._device):
            raise self._diverged("the loss", version)
        return measures, self._optimizer_step(version)

    def _optimizer_step(self, version: Version) -> float:
        """Let DeepSpeed take the step. ZeRO leaves it out where the norm is not finite; stage 0 has to be stopped."""
        if self._train.zero_stage == 0:
            gradients = [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if parallel.on_any_rank(not math.isfinite(norm), self._device):
                raise self._diverged("the gradient norm", version)
            self._engine.step()
            return norm
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        is_left_out = bool(self._engine.optimizer.overflow)
        if parallel.on_any_rank(is_left_out or not math.isfinite(norm), self._device):
            raise self._diverged("the gradient norm", version)
        return norm

    def _look_ahead(
        self, part: RankPart, inputs: Sequence[dict[str, Any]], is_first: bool
    ) -> tuple[float, RowsSettled | None]:
        """The count that the step's sum is divided by, and what rows of batch scope settle on."""
        objective = self._objective
        count = float(part.num_weighted_tokens) if objective.counts_tokens else objective.count(inputs, self._device)
        if not objective.has_statistics:
            return count, None
        if objective.looks_at_policy:
            for microbatch, of_rows in zip(part.microbatches, inputs, strict=True):
                of_rows["policy_logprobs_T"] = (
                    of_rows["proximal_logprobs_T"]  # the very policy, before the first step
                    if is_first
                    else self._no_grad_logprobs(microbatch).reshape(-1)
                )
        return count, objective.settle(inputs, self._device)

    def _train_microbatch(
        self, microbatch: Microbatch, inputs: Mapping[str, Any], settled: RowsSettled | None
    ) -> tuple[Tensor, dict[str, Measure]]:
        """``inputs``: of the rows; without the proximal policy it is that of this very forward."""
        current = self._forward(microbatch.token_ids, microbatch.position_ids, self._temperature)
        policy_T = current.logprobs.reshape(-1)
        objective = self._objective.of(
            settled,
            microbatch.on_policy_mask.to(self._device).reshape(-1),
            {"proximal_logprobs_T": policy_T.detach(), **inputs, "policy_logprobs_T": policy_T},
        )
        entropy = Mean.of(current.entropy.reshape(-1), inputs["mask_T"])
        return objective.loss_sum, {**objective.measures, "actor/entropy": entropy}

    def _no_grad_logprobs(self, microbatch: Microbatch) -> Tensor:
        with torch.no_grad():
            return self._forward(microbatch.token_ids, microbatch.position_ids, self._temperature).logprobs

    def _forward(self, token_ids: Tensor, position_ids: Tensor, temperature: float) -> TokenLogprobs:
        """No attention mask is given: transformers then derives it from the restarting positions (a mask of ones
        would let packed samples see one another)."""
        token_ids, position_ids = token_ids.to(self._device), position_ids.to(self._device)
        logits = self._engine(input_ids=token_ids, position_ids=position_ids, use_cache=False).logits
        return token_logprobs(logits, token_ids, position_ids, temperature=temperature)

    def _diverged(self, quantity: str, version: Version) -> Diverged:
        return Diverged(quantity, version.step + 1, str(version))


def _learning_rate_factor(step: int, *, warmup_steps: int) -> float:
    """Linear warm-up from 1 / warmup_steps to 1, then constant."""
    return min(1.0, (step + 1) / max(1, warmup_steps))
