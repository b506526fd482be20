"""How a vLLM worker takes over an adapter: a version that is a few low-rank matrices on the base model of the engine.

The tensors come with the names that peft gives them in its files, their scaling already in ``lora_B``. vLLM's own way
to a new adapter is a folder with files; what it makes of one is made here of the tensors, and put into its one slot.

Legend: T tokens of a batch, R rank with its padding, I and O inputs and outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest

# With every request, the probe's too. The slot is filled before the first one, so that the path is never looked at.
ADAPTER_REQUEST = LoRARequest("policy", 1, "in memory")


class AdapterSlot:
    """The one adapter of a model. It is filled while nothing runs on the model.

    Args:
        model: vLLM's, started with room for adapters.
    """

    def __init__(self, model: Any) -> None:
        self._manager = model.lora_manager
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._names = None if mapper is None else mapper.get_rename_mapper()
        self._next: LoRAModel | None = None
        for arithmetic in self._manager.punica_wrapper_mapping.values():
            if type(arithmetic) is PunicaWrapperCPU:
                arithmetic.add_lora_linear = add_adapter

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Have the next adapter ready. Returns why it cannot be served; None where it can.

        Args:
            tensors: may be overwritten afterwards.
        """
        rank = max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
        room = self._manager.lora_config
        if rank > room.max_lora_rank:
            return f"the adapter has rank {rank}, the engine was started with room for {room.max_lora_rank}"
        adapter = LoRAModel.from_lora_tensors(
            ADAPTER_REQUEST.lora_int_id,
            {name: tensor.clone() for name, tensor in tensors.items()},
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # a factor of 1: the scaling is in the tensors
            device="cpu",
            dtype=room.lora_dtype,
            weights_mapper=self._names,
        )
        if strange := sorted(adapter.loras.keys() - self._layers()):  # vLLM would leave them out without a word
            return f"the engine's model has no layer for the adapter at {', '.join(strange[:3])}"
        self._next = adapter
        return None

    def exchange(self) -> None:
        """The adapter that was prepared takes the place of the one before."""
        assert self._next is not None
        adapter, self._next = self._next, None
        self._manager.remove_adapter(adapter.id)
        self._manager.add_adapter(adapter)
        self._manager.activate_adapter(adapter.id)

    def _layers(self) -> set[str]:
        """Names of layers that may have an adapter, those that vLLM has joined into one under their own names."""
        joined = {part for parts in self._manager.packed_modules.values() for part in parts}
        return set(self._manager.modules) | joined


def add_adapter(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: Sequence[torch.Tensor],
    lora_b_stacked: Sequence[torch.Tensor],
    scale: float,
    output_slices: Sequence[int],
    **_: Any,
) -> None:
    """Add to ``y`` [T, O] what the adapter in the first slot makes of ``x`` [T, I], in place of what vLLM's CPU backend
    does: that copies the adapter's matrices once for every token, since each might have another adapter.

    Args:
        lora_a_stacked, lora_b_stacked: [slots, 1, R, I] and [slots, 1, O, R] of each layer that is joined here.
        output_slices: which of the O outputs each of them has.
    """
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    end = 0
    for down, up, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        begin, end = end, end + size
        y[:, begin:end] += (x @ down[0, 0].t()) @ up[0, 0].t() * scale
