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
from rlsys.train.logprobs import token_logprobs
from rlsys.train.model import load_model
from rlsys.train.trained import Trained

_KEEPING_WHOLE = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")


class ReferenceBase:
    """The base of a policy that is adapters: the policy with its adapters switched off. Nothing is copied."""

    def __init__(self, policy: Trained, device: str) -> None:
        self._policy, self._device = policy, device

    def logprobs(self, microbatch: Microbatch, temperature: float) -> Tensor:
        """[R, L], of the tokens that stand there, under the temperature of the policy. A collective under ZeRO-3."""
        with self._policy.module.disable_adapter():
            return _logprobs(self._policy, microbatch, temperature, self._device)

    def destroy(self) -> None:
        """Nothing of it is its own."""


class ReferenceCopy:
    """A copy of the model of the start, on every rank; under ZeRO-3 cut into shards as the policy is.

    Args:
        model_path: Hugging Face folder.
    """

    def __init__(self, model_path: str, *, deepspeed: ModuleType, device: str, zero_stage: int) -> None:
        self._device = device
        module = load_model(model_path).eval().requires_grad_(False)
        self._engine: Any = None
        self._forward: Any = module.to(device)
        if zero_stage == 3:
            # no parameter is kept whole between forward passes: ``become`` and ``restore`` write into shards alone
            zero = {"stage": 3, **dict.fromkeys(_KEEPING_WHOLE, 0)}
            settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
            self._engine, *_ = deepspeed.initialize(model=module, config=settings)
            self._forward = self._engine
        self._parameters = list(module.parameters())

    def logprobs(self, microbatch: Microbatch, temperature: float) -> Tensor:
        """[R, L], of the tokens that stand there, under the temperature of the policy. A collective under ZeRO-3."""
        return _logprobs(self._forward, microbatch, temperature, self._device)

    def become(self, policy: torch.nn.Module) -> None:
        """Take over the policy's weights, each rank its own part."""
        for own, theirs in zip(self._parameters, policy.parameters(), strict=True):
            _part(own).copy_(_part(theirs))

    def state(self) -> list[Tensor]:
        """This rank's part of the weights, to be saved."""
        return [_part(parameter) for parameter in self._parameters]

    def restore(self, state: list[Tensor]) -> None:
        for own, saved in zip(self._parameters, state, strict=True):
            _part(own).copy_(saved)

    def destroy(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self._forward = None
        self._parameters = []


@torch.no_grad()
def _logprobs(forward: Callable[..., Any], microbatch: Microbatch, temperature: float, device: str) -> Tensor:
    token_ids, positions = microbatch.token_ids.to(device), microbatch.position_ids.to(device)
    logits = forward(input_ids=token_ids, position_ids=positions, use_cache=False).logits
    return token_logprobs(logits, token_ids, positions, temperature=temperature).logprobs


def _part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: the whole of it, or its shard under ZeRO-3."""
    shard = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard.data
