"""The reference policy: a model that is not trained, against which the divergence of the policy is measured.

Legend: R rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlsys.batch.tensors import Microbatch
from rlsys.train.checkpoint import Layout
from rlsys.train.head import LeanHead
from rlsys.train.logprobs import logprobs_by
from rlsys.train.model import load_model
from rlsys.train.trained import Trained

_KEEPING_WHOLE = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")


class ReferenceBase:
    """The base of a policy that is adapters: the policy with its adapters switched off. Nothing is copied.

    Args:
        head: the policy's, where it is lean.
    """

    def __init__(self, policy: Trained, head: LeanHead | None, device: str) -> None:
        self._policy, self._head, self._device = policy, head, device

    def logprobs(self, microbatch: Microbatch, temperature: float) -> Tensor:
        """[R, L], of the tokens that stand there, under the temperature of the policy. A collective under ZeRO-3
        and tensor parallel."""
        with self._policy.module.disable_adapter():
            return _logprobs(self._policy, self._head, microbatch, temperature, self._device)

    def destroy(self) -> None:
        """Nothing of it is its own."""


class ReferenceCopy:
    """A copy of the model of the start, on every rank; under ZeRO-3 and tensor parallel cut as the policy is.

    Args:
        model_path: Hugging Face folder.
        layout: of the policy.
        is_lean: whether the policy's head is.
    """

    def __init__(self, model_path: str, *, deepspeed: ModuleType, device: str, layout: Layout, is_lean: bool) -> None:
        self._device = device
        module = load_model(model_path).eval().requires_grad_(False)
        self._engine: Any = None
        self._forward: Any = module.to(device)
        if layout.zero_stage == 3 or layout.tensor_parallel > 1:
            parts: dict[str, Any] = {"autotp_size": layout.tensor_parallel}
            if not is_lean:
                parts["vocab_parallel_lm_head"] = False
            settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": parts}
            if layout.zero_stage == 3:
                # no parameter is kept whole between forward passes: ``become`` and ``restore`` write into shards alone
                settings["zero_optimization"] = {"stage": 3, **dict.fromkeys(_KEEPING_WHOLE, 0)}
            self._engine, *_ = deepspeed.initialize(model=module, config=settings)
            self._forward = self._engine
        self._head = LeanHead(module.get_output_embeddings()) if is_lean else None
        self._parameters = list(module.parameters())

    def logprobs(self, microbatch: Microbatch, temperature: float) -> Tensor:
        """[R, L], of the tokens that stand there, under the temperature of the policy. A collective under ZeRO-3
        and tensor parallel."""
        return _logprobs(self._forward, self._head, microbatch, temperature, self._device)

    def become(self, policy: torch.nn.Module) -> None:
        """Take over the policy's weights, each rank its own part."""
        for own, theirs in zip(self._parameters, policy.parameters(), strict=True):
            _part(own).copy_(_part(theirs))

    def state(self) -> list[Tensor]:
        """This rank's part of the weights, to be saved."""
        return [_part(parameter) for parameter in self._parameters]

    def restore(self, state: list[Tensor], data_rank: int) -> None:
        """Take up what ``state`` gave to this rank, or the whole of what it gave to all ranks, one after another."""
        for own, saved in zip(self._parameters, state, strict=True):
            part, flat = _part(own), saved.flatten()
            if flat.numel() != part.numel():
                first = data_rank * part.numel() if hasattr(own, "ds_tensor") else 0
                flat = flat[first : first + part.numel()]
            part.flatten()[: flat.numel()].copy_(flat)  # the last shard may end in padding

    def destroy(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self._forward = self._head = None
        self._parameters = []


@torch.no_grad()
def _logprobs(
    forward: Callable[..., Any], head: LeanHead | None, microbatch: Microbatch, temperature: float, device: str
) -> Tensor:
    token_ids, positions = microbatch.token_ids.to(device), microbatch.position_ids.to(device)
    return logprobs_by(forward, head, token_ids, positions, temperature=temperature).logprobs


def _part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: the whole of it, or its shard under ZeRO-3."""
    shard = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard.data
