"""One rank of the learner: the policy under DeepSpeed, and the models around it. A plain class; actors/ puts it into a
process.

Legend: R rows, L tokens of a row.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.algo.measures import Mean, Measure, merge
from rlsys.algo.objective import RowsSettled
from rlsys.batch.tensors import Microbatch, RankBatch, RankPart
from rlsys.config.schema import TrainSection
from rlsys.records import Version
from rlsys.train import parallel
from rlsys.train.base import check_base
from rlsys.train.checkpoint import CRITIC_FOLDER, Layout, Written, check_readable
from rlsys.train.compiled_ops import load_needed_op
from rlsys.train.critic import Critic, CriticPlan
from rlsys.train.deepspeed_config import deepspeed_config
from rlsys.train.experts import Routers
from rlsys.train.head import LeanHead, give_logits_in_float32
from rlsys.train.logprobs import TokenLogprobs, logprobs_by
from rlsys.train.lora import base_of, leaves_base_alone
from rlsys.train.model import load_critic, save_model
from rlsys.train.objective import Objective
from rlsys.train.policy import base_below, load_policy
from rlsys.train.reference import ReferenceBase, ReferenceCopy
from rlsys.train.sameness import check_is_same_model, has_plain_head, tried
from rlsys.train.schedule import LearningRate, learning_rate
from rlsys.train.snapshot import BackgroundWriter, host_copies
from rlsys.train.speed import Speed
from rlsys.train.terms import MovingTerms
from rlsys.train.trained import Trained

Inputs = dict[str, Any]  # of one microbatch, by the names of the legend of algo/rows.py


class LearnerRank:
    """Trains batches. ``start``, ``step``, ``export``, ``probe_logprobs``, ``save_hf``, ``save_checkpoint`` and
    ``stop`` are collectives: every rank calls them in the same order.

    Construction imports everything slow and meets nobody, so ranks are constructed first and then started together.

    Args:
        model_path: Hugging Face folder.
        train: its section of the configuration.
        temperature: what the engines sample with; logits are divided by it.
        objective: what is minimised.
        critic: None where advantages need none.
        batches: how many the run trains; learning rates come to their end with the last.
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
        batches: int = 1,
        critic: CriticPlan | None = None,
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
        self._terms = MovingTerms({"kl": objective.kl.term if objective.kl else None, "entropy": objective.entropy})
        self._critic_plan = critic
        self._writer = BackgroundWriter()
        self._rate = learning_rate(train, batches=batches - (critic.warmup_steps if critic is not None else 0))
        self._policy: Any = None  # Trained, once started
        self._speed: Any = None  # Speed, likewise
        self._head: LeanHead | None = None
        self._critic: Critic | None = None
        self._reference: ReferenceBase | ReferenceCopy | None = None
        self._rank = 0
        self._routers: Any = None  # Routers, once started

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the model; known once started."""
        return int(self._policy.module.config.get_text_config().vocab_size)

    def start(
        self, rank: int, world_size: int, master_addr: str, master_port: int, checkpoint: str | None = None
    ) -> None:
        """Meet the other ranks and bring DeepSpeed up, in the state of ``checkpoint`` where that is given.

        Args:
            rank, world_size: of all processes; those of one data-parallel rank (``train.processes``) stand in a row.
            checkpoint: folder of an earlier ``save_checkpoint``; None starts from the model.

        Raises:
            ConfigError: ``train.deepspeed`` contradicts us; or the checkpoint is of another layout and was not
                converted, or needs another model below it (told before anything is loaded).
            CheckpointDamaged: there is no checkpoint in ``checkpoint``.
        """
        deepspeed_config(self._train, device=self._device)  # refuses before anybody is met
        load_needed_op(self._train, device=self._device)
        layout = Layout.of(self._train, world_size=world_size)
        self._rank = rank
        if checkpoint is not None:
            check_readable(checkpoint, layout)
            check_base(checkpoint, self._model_path)
        parallel.join(
            self._deepspeed,
            device=self._device,
            rank=rank,
            world_size=world_size,
            master_addr=master_addr,
            master_port=master_port,
            timeout_s=self._train.timeout_s,
            processes_a_rank=layout.processes_a_rank,
        )
        trained = partial(Trained, deepspeed=self._deepspeed, device=self._device, rank=rank, layout=layout)
        self._start_policy(layout, trained)
        if self._critic_plan is not None:
            section = self._train.model_copy(update={"lr": self._critic_plan.lr, "expert_parallel": 1})
            model = load_critic(self._critic_plan.model_path)
            own = trained(model, section, LearningRate(), layout=replace(layout, expert_parallel=1))
            self._critic = Critic(own, self._critic_plan.loss, self._device)
        if self._objective.kl is not None and self._train.lora is not None:
            self._reference = ReferenceBase(self._policy, self._head, self._device)
        elif self._objective.kl is not None:
            self._reference = ReferenceCopy(
                self._model_path,
                deepspeed=self._deepspeed,
                device=self._device,
                layout=layout,
                is_lean=self._head is not None,
            )
        if checkpoint is not None:
            self._load(checkpoint)

    def _start_policy(self, layout: Layout, trained: Callable[..., Trained]) -> None:
        policy = load_policy(self._model_path, self._train)
        vocab_size = base_of(policy).config.get_text_config().vocab_size
        whole = tried(policy, None, vocab_size=vocab_size, device="cpu")
        is_lean = has_plain_head(policy, whole)
        base = base_below(self._model_path, self._train, policy)
        self._speed = Speed(policy, self._train, self._device)
        self._policy = trained(policy, self._train, self._rate, whole_logits=not is_lean, base=base)
        head = base_of(self._policy.module).get_output_embeddings()
        if is_lean:
            self._head = LeanHead(head, self._policy.cut, in_float32=self._train.float32_head)
        elif self._train.float32_head:
            give_logits_in_float32(head)
        self._routers = Routers(
            self._policy.module, coef=self._train.router_aux_coef, device=self._device, cut=self._policy.cut
        )
        if max(layout.tensor_parallel, layout.expert_parallel, layout.sequence_parallel) > 1:
            cut = tried(self._policy, self._head, vocab_size=vocab_size, device=self._device)
            check_is_same_model(cut, whole, self._train)

    def _load(self, checkpoint: str) -> None:
        if self._critic is not None:
            self._critic.trained.load(os.path.join(checkpoint, CRITIC_FOLDER))
        own = self._policy.load(checkpoint)  # last: it sets the random generators
        self._terms.restore(own["terms"])
        if isinstance(self._reference, ReferenceCopy) and "reference" in own:
            self._reference.restore(own["reference"], self._rank // self._train.tensor_parallel)

    def stop(self) -> None:
        """Let go of the models and of the other ranks; ``start`` may follow, with a new port."""
        if self._reference is not None:
            self._reference.destroy()
        if self._critic is not None:
            self._critic.trained.destroy()
        if self._policy is not None:
            self._policy.destroy()
        self._policy = self._head = self._critic = self._reference = self._routers = None
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
        parts = [[self._objective.inputs(mb, self._device) for mb in part.microbatches] for part in batch.parts]
        measures = self._look_before(batch, parts)
        looked_s = time.perf_counter() - began
        if self._critic_plan is None or batch.version.step >= self._critic_plan.warmup_steps:
            for part, inputs in zip(batch.parts, parts, strict=True):
                own = self._train_part(part, inputs, batch.version, is_first=part is batch.parts[0])
                measures = merge(measures, own)
        actor_s = time.perf_counter() - began - looked_s
        if self._critic is not None:
            for part, inputs in zip(batch.parts, parts, strict=True):
                measures = merge(measures, self._critic.train_part(part, inputs, batch.version))
        metrics = parallel.reduce(measures, self._device)
        if self._critic is not None:
            metrics |= self._critic.trained.report("critic", metrics.get("critic/vf_loss"))
        return {
            **metrics,
            **self._after(batch, metrics),
            **self._routers.metrics(),
            **self._policy.report("actor", metrics.get("actor/pg_loss")),
            **self._speed.mfu(metrics, actor_s),
            "perf/train_tokens": float(batch.num_tokens),
            "perf/balance": batch.balance,
            "timing_s/look_ahead": looked_s,
            "timing_s/update_actor": actor_s,
            "timing_s/update_critic": time.perf_counter() - began - looked_s - actor_s,
        }

    def _look_before(self, batch: RankBatch, parts: Sequence[Sequence[Inputs]]) -> dict[str, Measure]:
        """What the policy and the models around it say of the batch before its first step, and what follows from it."""
        for part, inputs in zip(batch.parts, parts, strict=True):
            for microbatch, of_rows in zip(part.microbatches, inputs, strict=True):
                if part is not batch.parts[0] or self._objective.looks_ahead:
                    of_rows["proximal_logprobs_T"] = self._no_grad_logprobs(microbatch).reshape(-1)
                if self._reference is not None:
                    of_rows["ref_logprobs_T"] = self._reference.logprobs(microbatch, self._temperature).reshape(-1)
                if self._critic is not None:
                    with torch.no_grad():
                        values_T = self._critic.values(microbatch).reshape(-1)
                    of_rows["values_T"] = of_rows["old_values_T"] = values_T
        everything = [of_rows for inputs in parts for of_rows in inputs]
        return self._objective.give_advantages(everything, self._terms.weight("kl"), self._device)

    def _after(self, batch: RankBatch, metrics: Mapping[str, float]) -> dict[str, float]:
        """Move the weights of the further terms, and the reference. Returns the weights that the step had."""
        objective, step = self._objective, batch.version.step + 1
        weights = {
            f"actor/{name}_coef": self._terms.weight(name)
            for name, term in (("kl", objective.kl), ("entropy", objective.entropy))
            if term is not None
        }
        tokens_a_rollout = sum(part.num_weighted_tokens for part in batch.parts) / max(1, batch.num_samples)
        measured = {
            "kl": metrics.get("actor/kl_loss", metrics.get("critic/kl", 0.0)) * tokens_a_rollout,
            "entropy": metrics.get("actor/entropy", 0.0),
        }
        self._terms.move(measured, rollouts=batch.num_samples, step=step)
        if isinstance(self._reference, ReferenceCopy) and objective.refreshes_at(step):
            self._reference.become(self._policy.module)
        return weights

    def export(self, write: Callable[[Mapping[str, Tensor]], None], *, adapters_only: bool = False) -> None:
        """Hand every full weight, or those of the adapters alone, to ``write``, bucket by bucket, on rank 0 only. The
        tensors are valid during the call."""
        for bucket in self._policy.adapter_weights() if adapters_only else self._policy.weights:
            if self._rank == 0:
                write(bucket)

    def save_hf(self, folder: str) -> None:
        """Write the model as a plain Hugging Face folder (rank 0 writes, every rank takes part)."""
        weights: dict[str, Tensor] = {}
        self.export(lambda bucket: weights.update(host_copies(bucket)))
        if self._rank == 0:
            save_model(base_of(self._policy.module), weights, self._model_path, folder)

    def save_adapter(self, folder: str) -> None:
        """Write the adapters by themselves as peft's folder (rank 0 writes, every rank takes part). Not where there are
        none, nor where they began with a change of the base: whoever has the base could not use them."""
        if self._train.lora is not None and leaves_base_alone(self._train.lora):
            self._policy.save_adapter(folder)

    def save_checkpoint(self, folder: str) -> None:
        """Copy everything that a later ``start`` needs to go on bit for bit, and begin to write the copy. The one
        before is written by now."""
        own: dict[str, Any] = {"terms": self._terms.state()}
        if isinstance(self._reference, ReferenceCopy) and self._objective.moves_reference:
            own["reference"] = self._reference.state()
        taken = [self._policy.take(folder, own)]
        if self._critic is not None:
            taken.append(self._critic.trained.take(os.path.join(folder, CRITIC_FOLDER), {}))
        self._writer.write(taken)

    def checkpoint_written(self, wait_s: float = 0.0) -> Written | None:
        """How this rank's part of the last checkpoint was written; None where that is still under way after ``wait_s``
        seconds. No collective."""
        return self._writer.written(wait_s)

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
        self, part: RankPart, inputs: Sequence[Inputs], version: Version, *, is_first: bool
    ) -> dict[str, Measure]:
        """One optimizer step. Returns its measures."""
        count, settled = self._look_ahead(part, inputs, is_first)
        self._routers.settle(part.microbatches, self._no_grad_logprobs)
        measures: dict[str, Measure] = {"perf/train_flops": self._speed.work.of(part)}
        is_finite, last = True, len(part.microbatches) - 1
        for index, (microbatch, of_rows) in enumerate(zip(part.microbatches, inputs, strict=True)):
            loss_sum, own = self._forward_microbatch(microbatch, of_rows, settled)
            loss_sum = loss_sum + count * self._routers.balance_loss()
            is_finite = is_finite and bool(torch.isfinite(loss_sum))
            self._policy.backward(loss_sum, count, is_last=index == last)
            measures = merge(measures, own)
        self._policy.refuse_unless_finite(is_finite, "the loss", version)
        self._policy.step(version)
        return measures

    def _look_ahead(self, part: RankPart, inputs: Sequence[Inputs], is_first: bool) -> tuple[float, RowsSettled | None]:
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

    def _forward_microbatch(
        self, microbatch: Microbatch, inputs: Inputs, settled: RowsSettled | None
    ) -> tuple[Tensor, dict[str, Measure]]:
        """``inputs``: of the rows; without the proximal policy it is that of this very forward."""
        entropy_coef = self._terms.weight("entropy")
        teacher = microbatch.teacher
        with self._routers.at(microbatch):
            current = self._forward(
                microbatch.token_ids,
                microbatch.position_ids,
                self._temperature,
                candidate_ids=teacher.candidate_ids if teacher is not None else None,
                entropy_gradient=entropy_coef != 0.0,
            )
        policy_T, entropy_T = current.logprobs.reshape(-1), current.entropy.reshape(-1)
        objective = self._objective.of(
            settled,
            microbatch.on_policy_mask.to(self._device).reshape(-1),
            {
                "proximal_logprobs_T": policy_T.detach(),
                **inputs,
                "policy_logprobs_T": policy_T,
                "entropy_T": entropy_T,
                "candidate_logprobs_TK": current.candidate_logprobs.flatten(0, 1),
            },
            kl_coef=self._terms.weight("kl"),
            entropy_coef=entropy_coef,
        )
        entropy = Mean.of(entropy_T, inputs["mask_T"])
        return objective.loss_sum, {**objective.measures, "actor/entropy": entropy}

    def _no_grad_logprobs(self, microbatch: Microbatch) -> Tensor:
        with torch.no_grad(), self._routers.at(microbatch):
            return self._forward(microbatch.token_ids, microbatch.position_ids, self._temperature).logprobs

    def _forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        temperature: float,
        *,
        candidate_ids: Tensor | None = None,
        entropy_gradient: bool = False,
    ) -> TokenLogprobs:
        return logprobs_by(
            self._policy,
            self._head,
            token_ids.to(self._device),
            position_ids.to(self._device),
            temperature=temperature,
            candidate_ids=None if candidate_ids is None else candidate_ids.to(self._device),
            entropy_gradient=entropy_gradient,
        )
