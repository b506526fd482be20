"""Full weights from a model that ZeRO may have partitioned, one module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

from torch import Tensor, nn


def full_weights(model: nn.Module, *, deepspeed: ModuleType, zero_stage: int) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of every parameter, in the order of the modules, under the model's own names.

    A collective under ZeRO-3: every rank runs it to its end. A tensor is valid until the next one is asked for, and
    aliases the live parameter: copy it. The second name of a tied pair (``lm_head.weight``) is left out.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = {
            name: parameter for name, parameter in module.named_parameters(recurse=False) if id(parameter) not in seen
        }
        if not own:
            continue
        seen.update(id(parameter) for parameter in own.values())
        gathered: AbstractContextManager[object] = (
            deepspeed.zero.GatheredParameters(list(own.values())) if zero_stage == 3 else nullcontext()
        )
        with gathered:
            for name, parameter in own.items():
                yield (f"{prefix}.{name}" if prefix else name), parameter.data
