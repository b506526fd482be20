"""Sequence parallel: the processes of a data-parallel rank have a piece of every row each.

DeepSpeed's Ulysses exchanges within attention: there each process has all tokens of some heads. Its own attention knows
no packed rows (it leaves the mask out, so that samples would see one another), so that it is given one that does. It
hands that the positions of the whole row.

Legend: R rows, L tokens of a row, P processes, H heads, D size of a head.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlsys.errors import ConfigError
from rlsys.train import parallel

_NAME = "rlsys_sequence_parallel"  # of the attention, for transformers


class SequenceParallel:
    """Makes a model one whose rows are cut. Construction is a collective of all processes.

    Args:
        model: of transformers.
        parts: processes in a row that share the rows.

    Raises:
        ConfigError: its attention is more than causal attention within samples. At the first forward pass, where it
            shows only there; in every process alike.
    """

    def __init__(self, model: Any, parts: int) -> None:
        import deepspeed.runtime.sequence_parallel.parallel_state_sp as groups
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        self._parts, self._place = parts, dist.get_rank() % parts
        if model.config._attn_implementation != "sdpa":
            self._refuse(model, "takes other attention than scaled_dot_product_attention")
        groups.initialize_sequence_parallel(parts)
        self.groups = groups  # what DeepSpeed calls mpu
        self._group = groups.get_sequence_parallel_group()
        config = model.config.get_text_config()
        self._ulysses = UlyssesSPAttentionHF(
            attn=packed_attention,
            batch_size=1,
            attn_head_count=config.num_attention_heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            kv_head_count=config.num_key_value_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=self._group,
            seq_length_is_variable=True,
        )
        AttentionInterface.register(_NAME, self._attend)
        model.set_attn_implementation(_NAME)

    def cut(self, tensor_RL: Tensor) -> Tensor:
        """[R, L, ...] to this process's piece of it, [R, ceil(L / P), ...]; zeros fill the last one up."""
        length = -(-tensor_RL.shape[1] // self._parts)
        missing = length * self._parts - tensor_RL.shape[1]
        padded = F.pad(tensor_RL, (0, 0) * (tensor_RL.ndim - 2) + (0, missing))
        return padded[:, self._place * length : (self._place + 1) * length].contiguous()

    def forward(self, model: Any, *, input_ids: Tensor, position_ids: Tensor, **inputs: Any) -> Any:
        """What ``model`` says of whole rows; its logits [R, L, ...] are whole in every process. A collective.

        A process's backward pass takes the gradient of its own piece, so that the gradients of the processes add up.
        """
        output = model(input_ids=self.cut(input_ids), position_ids=self.cut(position_ids), **inputs)
        output.logits = _Joined.apply(output.logits, self._group, self._place)[:, : input_ids.shape[1]]
        return output

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **keys: Any) -> Any:
        if "position_ids" not in keys:
            self._refuse(module, "does not hand the positions of tokens to its attention")
        if keys.get("sliding_window") is not None:
            self._refuse(module, "attends within a window")
        ulysses, rows = self._ulysses, query.shape[0]
        ulysses.batch_size = rows  # it is made for so many rows, and checks
        for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
            length, _, *others = getattr(ulysses, name)
            setattr(ulysses, name, torch.Size([length, rows, *others]))
        return ulysses(module, query, key, value, None, **keys)

    def _refuse(self, module: Any, what: str) -> NoReturn:
        raise ConfigError(
            f"train.sequence_parallel={self._parts}",
            got=f"{type(module).__name__}, which {what}",
            wanted="a class of transformers with full attention that is told positions, as those of Llama and Qwen3",
            remedy="set train.sequence_parallel=1",
        )


def packed_attention(
    module: Any, query_RHLD: Tensor, key_RHLD: Tensor, value_RHLD: Tensor, mask: None, **keys: Any
) -> tuple[Tensor, None]:
    """Causal attention within each sample of a row; where positions restart, a sample begins."""
    position_ids = keys.pop("position_ids")
    samples_RL = (position_ids == 0).cumsum(dim=1)
    if int(samples_RL.max()) > 1:
        is_same_RLL = samples_RL.unsqueeze(2) == samples_RL.unsqueeze(1)
        mask_R1LL = is_same_RLL.tril().unsqueeze(1)
    else:
        mask_R1LL = None  # plain causal attention, which has the faster kernel
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query_RHLD, key_RHLD, value_RHLD, mask_R1LL, **keys)
    return output


class _Joined(torch.autograd.Function):
    """The pieces of all processes of the group, one after another along the second dimension."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any, place: int) -> Tensor:
        ctx.place, ctx.length = place, own.shape[1]
        return parallel.joined(own, group, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][:, ctx.place * ctx.length : (ctx.place + 1) * ctx.length].contiguous(), None, None
