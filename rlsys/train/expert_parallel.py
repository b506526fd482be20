"""Expert parallel: DeepSpeed's AutoEP gives each process of a group some of the experts, and tokens travel to them.

It puts a layer of its own in place of the model's, with other names and another cut: here they are put back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsys.train import parallel


def is_expert_parallel(module: Any) -> bool:
    """Whether DeepSpeed has put ``module`` in place of a layer with experts."""
    return bool(getattr(module, "_is_autoep_layer", False))


def is_part_of_experts(parameter: Tensor) -> bool:
    """Whether other processes of the group have other experts in its place."""
    return getattr(parameter, "allreduce", True) is False


def whole_layer(layer: Any) -> dict[str, Tensor]:
    """The router and all experts, by the names of transformers below the layer. A collective of the layer's group.

    The experts are [E, 2 I, D] and [E, D, I] (E experts, I width within, D width): gate and up are one tensor.
    """
    experts = layer.experts
    gate, up, down = (
        parallel.joined(part.detach(), layer.ep_group, dim=0)  # the first process has the first experts
        for part in (experts.w1, experts.w3, experts.w2)
    )
    return {
        "gate.weight": layer.router.gate.weight.data,
        "experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "experts.down_proj": down,
    }
