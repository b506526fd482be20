"""Full weights from a model that ZeRO and tensor parallel may have cut, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from transformers.core_model_loading import revert_weight_conversion

from rlsys.train.expert_parallel import is_expert_parallel, whole_layer
from rlsys.train.lora import base_of, is_adapted, merged


class FullWeights:
    """Every weight of ``model``, whole: each iteration yields buckets, full tensors by name, in the order of the
    modules, as the model's files have them. A bucket is a module, or all of a model that nothing has cut.

    Files and modules may name and cut weights differently: the experts of a Mixtral are one tensor here, one each in
    its files. Engines and other readers know the files' way.

    A collective under ZeRO-3, tensor and expert parallel: every rank runs it to its end. A bucket is valid until the
    next one is asked for, and may alias the live parameters: copy it. The second name of a tied pair
    (``lm_head.weight``) is left out. Adapters are merged into the layers that they belong to.

    Args:
        model: prepared to its end: no parameter comes or goes any more, though their memory may.
    """

    def __init__(self, model: Any, *, deepspeed: ModuleType, zero_stage: int, tensor_parallel: int = 1) -> None:
        self._has_adapters, self._model = hasattr(model, "peft_config"), base_of(model)
        self._deepspeed, self._zero_stage, self._tensor_parallel = deepspeed, zero_stage, tensor_parallel
        # what from_pretrained noted: where it changed nothing, there is nothing to revert, and looking for it takes
        # longer than to copy a small model; so does opening module by module what lies whole in its place
        self._is_as_in_files = getattr(self._model, "_weight_conversions", None) == []

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        is_cut = self._zero_stage == 3 or self._tensor_parallel > 1
        if self._is_as_in_files and not self._has_adapters and not is_cut:
            yield {name: parameter.data for name, parameter in self._named}
        else:
            yield from self._by_module()

    @cached_property
    def _named(self) -> Sequence[tuple[str, Parameter]]:
        return list(self._model.named_parameters())

    def _by_module(self) -> Iterator[Mapping[str, Tensor]]:
        seen: set[int] = set()
        for prefix, module in self._model.named_modules():
            if is_expert_parallel(module):
                named = {f"{prefix}.{name}": tensor for name, tensor in whole_layer(module).items()}
                seen.update(id(parameter) for parameter in module.parameters())
                yield revert_weight_conversion(self._model, named)
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
                if self._zero_stage == 3:
                    stack.enter_context(self._deepspeed.zero.GatheredParameters(list(own.values())))
                if self._tensor_parallel > 1:
                    stack.enter_context(_joined(module, list(own.values())))
                tensors = stack.enter_context(merged(module) if has_adapters else _as_they_are(own))
                named = {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in tensors.items()}
                yield named if self._is_as_in_files else revert_weight_conversion(self._model, named)


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
