"""Full weights from a model that ZeRO and tensor parallel may have cut, one module at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter
from transformers.core_model_loading import revert_weight_conversion

from rlsys.train.expert_parallel import is_expert_parallel, whole_layer
from rlsys.train.lora import base_of, is_adapted, merged


def full_weights(
    model: Any, *, deepspeed: ModuleType, zero_stage: int, tensor_parallel: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of every weight, in the order of the modules, as the model's files have them.

    Files and modules may name and cut weights differently: the experts of a Mixtral are one tensor here, one each in
    its files. Engines and other readers know the files' way.

    A collective under ZeRO-3, tensor and expert parallel: every rank runs it to its end. A tensor is valid until the
    next one is asked for, and may alias the live parameter: copy it. The second name of a tied pair
    (``lm_head.weight``) is left out. Adapters are merged into the layers that they belong to.
    """
    has_any_adapters, model = hasattr(model, "peft_config"), base_of(model)
    # what from_pretrained noted: where it changed nothing, there is nothing to revert, and looking for it takes longer
    # than to copy a small model; so does opening module by module what lies whole in its place
    is_as_in_files = getattr(model, "_weight_conversions", None) == []
    if is_as_in_files and not has_any_adapters and zero_stage < 3 and tensor_parallel == 1:
        yield from _whole_weights(model)
        return
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if is_expert_parallel(module):
            named = {f"{prefix}.{name}": tensor for name, tensor in whole_layer(module).items()}
            seen.update(id(parameter) for parameter in module.parameters())
            yield from revert_weight_conversion(model, named).items()
        has_adapters = is_adapted(module)
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=has_adapters)
            if id(parameter) not in seen
        }
        if not own:
            continue
        seen.update(id(parameter) for parameter in own.values())
        with ExitStack() as stack:
            if zero_stage == 3:
                stack.enter_context(deepspeed.zero.GatheredParameters(list(own.values())))
            if tensor_parallel > 1:
                stack.enter_context(_joined(module, list(own.values())))
            tensors = stack.enter_context(merged(module) if has_adapters else _as_they_are(own))
            named = {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in tensors.items()}
            yield from (named if is_as_in_files else revert_weight_conversion(model, named)).items()


def _whole_weights(model: Module) -> Iterator[tuple[str, Tensor]]:
    """As ``model.named_parameters()``, in a third of its time."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter.data


def _as_they_are(own: dict[str, Parameter]) -> AbstractContextManager[dict[str, Tensor]]:
    return nullcontext({name: parameter.data for name, parameter in own.items()})


@contextmanager
def _joined(module: Any, own: Sequence[Parameter]) -> Iterator[None]:
    """Within, a layer that tensor parallel has cut holds its whole weights. Afterwards it has the very memory that it
    had: DeepSpeed would cut anew, and the optimizer writes into the old pieces."""
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    pieces = [parameter.data for parameter in own]
    with GatherReplacedLayerParams(list(own), module):
        yield
    for parameter, piece in zip(own, pieces, strict=True):
        parameter.data = piece
