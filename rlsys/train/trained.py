"""A module under DeepSpeed: its gradients, its optimizer steps, its state on disk. The policy is one; a critic too."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlsys.config.schema import TrainSection
from rlsys.errors import Diverged
from rlsys.records import Version
from rlsys.train import parallel
from rlsys.train.checkpoint import Layout, load_state, take_state
from rlsys.train.deepspeed_config import deepspeed_config
from rlsys.train.expert_parallel import is_expert_parallel, is_part_of_experts
from rlsys.train.export import FullWeights
from rlsys.train.frozen import leave_out_frozen
from rlsys.train.lora import adapter_weights, save_adapter
from rlsys.train.schedule import LearningRate
from rlsys.train.sequence_parallel import SequenceParallel
from rlsys.train.snapshot import HostMemory, Snapshot
from rlsys.train.spikes import Spikes


class Trained:
    """Methods that train, read the weights or touch the disk are collectives.

    Args:
        module: a model of transformers.
        train: the learner's section of the configuration; its learning rate is that of this module.
        rate: what becomes of that from step to step.
        layout: how it is spread over ranks.
        base: fingerprints of the files that what is frozen of the module stands in, so that checkpoints do without it;
            None: they hold all of it.
        whole_logits: whether every process needs the logits of the whole vocabulary; else it may have its part of them.
    """

    def __init__(
        self,
        module: Any,
        train: TrainSection,
        rate: LearningRate,
        *,
        deepspeed: ModuleType,
        device: str,
        rank: int,
        layout: Layout,
        base: Mapping[str, str] | None = None,
        whole_logits: bool = False,
    ) -> None:
        self._deepspeed, self._device, self._rank, self._layout = deepspeed, device, rank, layout
        self._base = base
        self._memory = HostMemory()
        if train.activation_checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})
        config = deepspeed_config(train, device=device)
        if whole_logits:
            config["tensor_parallel"]["vocab_parallel_lm_head"] = False
        # without ZeRO, DeepSpeed clips by the mean of the norms of processes, which have different experts
        self._clips_itself = layout.expert_parallel > 1 and layout.zero_stage == 0
        self._max_norm = train.max_grad_norm
        if self._clips_itself:
            config["gradient_clipping"] = 0.0
        self._sequence = SequenceParallel(module, layout.sequence_parallel) if layout.sequence_parallel > 1 else None
        self._engine, *_ = deepspeed.initialize(
            model=module,
            mpu=None if self._sequence is None else self._sequence.groups,
            model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
            config=config,
        )
        # one rank without ZeRO has nothing to add up, and DeepSpeed would copy its whole gradient to and fro for that
        self._adds_up = layout.zero_stage > 0 or layout.ranks * layout.sequence_parallel > 1
        self._engine.enable_backward_allreduce &= self._adds_up
        if base is not None:
            leave_out_frozen(self.module)
        self._rate = rate
        self._peaks = [group["lr"] for group in self._engine.optimizer.param_groups]
        self._resumed_at: int | None = None
        self._taken: list[tuple[float, float]] = []  # learning rate and gradient norm of the steps since a report
        self._norms, self._losses = Spikes(), Spikes()

    @property
    def module(self) -> Any:
        return self._engine.module

    def report(self, name: str, loss: float | None) -> dict[str, float]:
        """Metrics, below ``name``, of the steps since the last report: learning rate of the last of them (or of the
        next one, where there was none), mean gradient norm before clipping, and how far norm and loss stand out.

        Args:
            loss: mean over these steps; None where none was measured.
        """
        taken, self._taken = self._taken, []
        metrics = {f"{name}/lr": taken[-1][0] if taken else self._peaks[0] * self._factor()}
        if not taken:
            return metrics
        norms = [norm for _, norm in taken]
        metrics[f"{name}/grad_norm"] = sum(norms) / len(norms)
        metrics[f"{name}/grad_norm_spike"] = max(self._norms.see(norm) for norm in norms)
        metrics[f"{name}/grad_norm_spikes"] = float(self._norms.count)
        if loss is not None:
            metrics[f"{name}/loss_spike"] = self._losses.see(loss)
            metrics[f"{name}/loss_spikes"] = float(self._losses.count)
        return metrics

    @property
    def cut(self) -> Callable[[Tensor], Tensor] | None:
        """What makes whole rows those that the module has in this process; None where it has whole ones."""
        return None if self._sequence is None else self._sequence.cut

    def __call__(self, **inputs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(**inputs) if self._sequence is None else self._sequence.forward(self._engine, **inputs)

    def backward(self, loss_sum: Tensor, count: float, *, is_last: bool) -> None:
        """Add the gradient of ``loss_sum / count`` to that of the step, over all ranks.

        Args:
            count: the same on every rank.
            is_last: of the microbatches of the step.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        scale = self._layout.ranks / count  # DeepSpeed averages gradients over the ranks
        if self._layout.zero_stage == 3:  # there over all processes, though those that share rows have parts of a sum
            scale *= self._layout.sequence_parallel
        self._engine.backward(loss_sum * scale, scale_wrt_gas=False)

    def step(self, version: Version) -> None:
        """Let DeepSpeed take the step. ZeRO leaves it out where the norm is not finite; stage 0 has to be stopped.

        Raises:
            Diverged: on every rank alike, before the weights take up a gradient that is not finite.
        """
        factor = self._factor()
        for group, peak in zip(self._engine.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        if self._layout.zero_stage == 0:
            if not self._adds_up:
                self._fill_gradients()
            norm = self._gradient_norm()
            self.refuse_unless_finite(math.isfinite(norm), "the gradient norm", version)
            if self._clips_itself and 0.0 < self._max_norm < norm:
                for parameter in self.module.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._max_norm / norm)
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            is_left_out = bool(self._engine.optimizer.overflow)
            self.refuse_unless_finite(not is_left_out and math.isfinite(norm), "the gradient norm", version)
        self._taken.append((self._peaks[0] * factor, norm))

    def _fill_gradients(self) -> None:
        """Zeros where nothing reached a weight, as DeepSpeed has them where it adds up: weight decay is for all."""
        for parameter in self.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _factor(self) -> float:
        """Of the next step; DeepSpeed counts the steps, and keeps their number in its checkpoints."""
        return self._rate.factor(self._engine.global_steps, self._resumed_at)

    def _gradient_norm(self) -> float:
        """Of the whole gradient: a process has its pieces of what tensor parallel cuts, or its experts of what expert
        parallel shares out, and all of the rest."""
        pieces: list[Tensor] = []
        whole: list[Tensor] = []
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                is_piece = getattr(parameter, "tensor_model_parallel", False) or is_part_of_experts(parameter)
                (pieces if is_piece else whole).append(parameter.grad)
        norm_of_whole = _norm(whole)
        group = self._group_of_pieces()
        if group is None:
            return float(norm_of_whole)
        square_of_pieces = _norm(pieces).square()
        torch.distributed.all_reduce(square_of_pieces, group=group)
        return float((norm_of_whole.square() + square_of_pieces).sqrt())

    def _group_of_pieces(self) -> Any:
        """The processes whose pieces make up a whole; None where nothing is cut."""
        if self._layout.expert_parallel > 1:
            return next(part.ep_group for part in self.module.modules() if is_expert_parallel(part))
        return self._engine.mpu.get_tensor_model_parallel_group() if self._layout.tensor_parallel > 1 else None

    def refuse_unless_finite(self, is_finite: bool, quantity: str, version: Version) -> None:
        """Raises Diverged on every rank, where one of them has met what is not finite."""
        if parallel.on_any_rank(not is_finite, self._device):
            raise Diverged(quantity, version.step + 1, str(version))

    @cached_property
    def weights(self) -> FullWeights:
        """See ``FullWeights``."""
        return FullWeights(
            self.module,
            deepspeed=self._deepspeed,
            zero_stage=self._layout.zero_stage,
            tensor_parallel=self._layout.tensor_parallel,
        )

    def adapter_weights(self) -> Iterator[Mapping[str, Tensor]]:
        """See ``rlsys.train.lora.adapter_weights``."""
        return adapter_weights(self.module, deepspeed=self._deepspeed, zero_stage=self._layout.zero_stage)

    def save_adapter(self, folder: str) -> None:
        """See ``rlsys.train.lora.save_adapter``."""
        stage = self._layout.zero_stage
        save_adapter(self.module, folder, deepspeed=self._deepspeed, zero_stage=stage, rank=self._rank)

    def take(self, folder: str, own: Mapping[str, Any]) -> Snapshot:
        """See ``take_state``. The snapshot before it is overwritten."""
        return take_state(
            self._engine,
            folder,
            memory=self._memory,
            rank=self._rank,
            layout=self._layout,
            device=self._device,
            own={**own, "spikes": {"norms": self._norms.state(), "losses": self._losses.state()}},
            base=self._base,
        )

    def load(self, folder: str) -> Mapping[str, Any]:
        """See ``load_state``."""
        own = load_state(self._engine, folder, rank=self._rank, layout=self._layout, device=self._device)
        self._norms.restore(own["spikes"]["norms"])
        self._losses.restore(own["spikes"]["losses"])
        self._resumed_at = self._engine.global_steps
        return own

    def destroy(self) -> None:
        self._engine.destroy()
        self._engine = None
        gc.collect()  # the engine's hooks hold it in cycles


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all of them together, float32 whatever theirs is: in bfloat16 it would have three digits."""
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]))
