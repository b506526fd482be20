"""Log-probabilities straight from hidden states and the head's weight: logits are never whole in memory.

Legend: R rows, L tokens of a row, N tokens with a gradient or all, D width, V vocabulary (of this rank's part of the
head), B columns of a block, M tokens looked up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsys.errors import ConfigError

_BLOCK_ELEMENTS = 1 << 21  # 8 MiB of float32: a block and its temporaries stay in the processor's cache
_MIN_COLUMNS = 512  # of a block: narrower ones make slow matrix products, however many tokens there are


class LeanHead:
    """The head of a language model that can be told to look tokens up instead of giving logits.

    It answers from within the module's own forward pass, so that whatever DeepSpeed hangs on a module acts as ever:
    under ZeRO-3 the weight is gathered for it, in the backward pass too. Under tensor parallel each rank holds some
    rows of the weight; what they say of a token is put together over their group.

    Args:
        module: a linear layer whose outputs are the logits, or DeepSpeed's share of one.
        cut: of the targets, where the model has only a piece of each row.
        in_float32: multiply in float32, whatever the dtype of hidden states and weight.
    """

    def __init__(self, module: Any, cut: Callable[[Tensor], Tensor] | None = None, *, in_float32: bool = False) -> None:
        self._module, self._cut, self._in_float32 = module, cut, in_float32
        sizes = getattr(module, "_partition_sizes", ())  # of a layer that DeepSpeed has cut
        is_cut = len(sizes) > 1
        self._group = module.mp_group if is_cut else None
        self._first_row = sum(sizes[: module.tp_index]) if is_cut else 0

    @contextmanager
    def looking_up(self, targets_RLM: Tensor, temperature: float, entropy_gradient: bool) -> Iterator[None]:
        """Within, the model's "logits" are float32 [R, L, M + 1]: log-probabilities of the targets at each token under
        the temperature, then the entropy there."""
        if self._cut is not None:
            targets_RLM = self._cut(targets_RLM)
        self._module.forward = functools.partial(self._answer, targets_RLM, temperature, entropy_gradient)
        try:
            yield
        finally:
            del self._module.forward  # the class's own again

    def _answer(self, targets_RLM: Tensor, temperature: float, entropy_gradient: bool, hidden_RLD: Tensor) -> Tensor:
        assert hidden_RLD.shape[:2] == targets_RLM.shape[:2], f"{hidden_RLD.shape}, {targets_RLM.shape}"
        weight = self._module.weight
        logprobs_NM, entropy_N = _HeadLogprobs.apply(
            hidden_RLD.flatten(0, 1),
            weight,
            self._module.bias,
            targets_RLM.flatten(0, 1) - self._first_row,
            temperature,
            entropy_gradient,
            self._group,
            torch.float32 if self._in_float32 else _product_dtype(hidden_RLD, weight),
        )
        return torch.cat([logprobs_NM, entropy_N.unsqueeze(1)], dim=1).view(*targets_RLM.shape[:2], -1)


def give_logits_in_float32(head: Any) -> None:
    """Let a head that is not lean multiply in float32, whatever the dtype of hidden states and weight.

    Raises:
        ConfigError: it is no plain linear layer.
    """
    if type(head) is not torch.nn.Linear:
        raise ConfigError(
            "train.float32_head",
            got=f"a model whose head is {type(head).__name__}",
            wanted="a plain linear layer",
            remedy="set train.float32_head=false",
        )
    head.forward = functools.partial(_float32_linear, head)  # type: ignore[method-assign]


def _float32_linear(head: torch.nn.Linear, hidden_RLD: Tensor) -> Tensor:
    with torch.autocast(hidden_RLD.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(hidden_RLD.float(), head.weight.float(), bias)


class _HeadLogprobs(torch.autograd.Function):
    """Per token: log-probabilities of the targets, and entropy. Works in blocks of the vocabulary; the backward pass
    computes the logits again, of those tokens alone that have a gradient (tokens of prompts and those without an
    advantage have none)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_NM: Tensor,
        temperature: float,
        entropy_gradient: bool,
        group: Any,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.group, ctx.dtype = temperature, group, dtype
        wanted_NM = hidden_ND.new_zeros(targets_NM.shape, dtype=torch.float32)
        statistics = []
        spare = torch.empty(0, dtype=torch.float32, device=hidden_ND.device)
        for first, logits_NB in _blocks(hidden_ND.to(dtype), weight_VD, bias_V, temperature):
            wanted_NM += _taken(logits_NB, targets_NM - first)
            peak_N = logits_NB.amax(dim=1)
            shares_NB = torch.exp(logits_NB.sub_(peak_N.unsqueeze(1)), out=spare.resize_(logits_NB.shape))
            total_N = shares_NB.sum(dim=1)
            statistics.append(torch.stack([peak_N, total_N, shares_NB.mul_(logits_NB).sum(dim=1)]))
        peak_N, total_N, mean_N = _merged(torch.stack(statistics))
        if group is not None:
            parts = [torch.empty_like(statistics[0]) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, torch.stack([peak_N, total_N, mean_N]), group=group)
            peak_N, total_N, mean_N = _merged(torch.stack(parts))
            dist.all_reduce(wanted_NM, group=group)
        normaliser_N = peak_N + total_N.log()
        entropy_N = total_N.log() - mean_N / total_N
        ctx.save_for_backward(
            hidden_ND, weight_VD, bias_V, targets_NM, normaliser_N, entropy_N if entropy_gradient else None
        )
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return wanted_NM - normaliser_N.unsqueeze(1), entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d logprob_m / d scaled_v = [v = m] - p_v, and d entropy / d scaled_v = -p_v (log p_v + entropy)."""
        hidden_ND, weight_VD, bias_V, targets_NM, normaliser_N, entropy_N = ctx.saved_tensors
        of_logprobs_NM = gradients[0] / ctx.temperature
        of_entropy_N = None if entropy_N is None else gradients[1] / ctx.temperature
        has_gradient = (of_logprobs_NM != 0).any(dim=1)
        if of_entropy_N is not None:
            has_gradient |= of_entropy_N != 0
        chosen = has_gradient.nonzero().squeeze(1)
        hidden_nD, targets_nM = hidden_ND[chosen].to(ctx.dtype), targets_NM[chosen]
        of_logprobs_nM, normaliser_n1 = of_logprobs_NM[chosen], normaliser_N[chosen].unsqueeze(1)
        total_n1 = of_logprobs_nM.sum(dim=1, keepdim=True)
        of_hidden_nD = torch.zeros_like(hidden_nD, dtype=torch.float32)
        of_weight = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        of_bias = torch.empty_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        for first, logits_nB in _blocks(hidden_nD, weight_VD, bias_V, ctx.temperature):
            block = slice(first, first + logits_nB.shape[1])
            logprobs_nB = logits_nB.sub_(normaliser_n1)
            if of_entropy_N is None:
                gradient_nB = logprobs_nB.exp_().mul_(-total_n1)
            else:
                shifted_nB = logprobs_nB + entropy_N[chosen].unsqueeze(1)
                shifted_nB.mul_(of_entropy_N[chosen].unsqueeze(1)).add_(total_n1)
                gradient_nB = logprobs_nB.exp_().mul_(shifted_nB).neg_()
            _add_to(gradient_nB, targets_nM - first, of_logprobs_nM)
            if of_bias is not None:
                of_bias[block] = gradient_nB.sum(dim=0)
            gradient_nB = gradient_nB.to(ctx.dtype)
            if of_weight is not None:
                _put_product(of_weight[block], gradient_nB.t(), hidden_nD)
            _add_product(of_hidden_nD, gradient_nB, weight_VD[block].to(ctx.dtype))
        if ctx.group is not None:
            dist.all_reduce(of_hidden_nD, group=ctx.group)
        of_hidden_ND = torch.zeros_like(hidden_ND).index_copy_(0, chosen, of_hidden_nD.to(hidden_ND.dtype))
        return of_hidden_ND, of_weight, of_bias, None, None, None, None, None


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What a linear layer would compute in here: that of autocast where it is on."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _blocks(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float
) -> Iterator[tuple[int, Tensor]]:
    """First column and logits over temperature, float32 [N, B], of each block of the vocabulary. The next block takes
    the memory of the last one: large pieces that come and go leave the heap in tatters."""
    columns = max(_MIN_COLUMNS, _BLOCK_ELEMENTS // max(1, len(hidden_ND)))
    memory = torch.empty(0, dtype=torch.float32, device=hidden_ND.device)
    for first in range(0, len(weight_VD), columns):
        block = slice(first, first + columns)
        weight_BD = weight_VD[block].to(hidden_ND.dtype)
        logits_NB = memory.resize_(len(hidden_ND), len(weight_BD))
        if bias_V is None:
            _put_product(logits_NB, hidden_ND, weight_BD.t())
        else:
            logits_NB.copy_(F.linear(hidden_ND, weight_BD, bias_V[block].to(hidden_ND.dtype)))
        yield first, logits_NB if temperature == 1.0 else logits_NB.div_(temperature)


def _put_product(place: Tensor, left: Tensor, right: Tensor) -> None:
    """place = left @ right, rounded to the dtype of the two first where they have another one."""
    if place.dtype == left.dtype:
        torch.mm(left, right, out=place)
    else:
        place.copy_(left @ right)


def _add_product(place: Tensor, left: Tensor, right: Tensor) -> None:
    """place += left @ right, the sum in the dtype of ``place``."""
    if place.dtype == left.dtype:
        place.addmm_(left, right)
    else:
        place += left @ right


def _taken(logits_NB: Tensor, columns_NM: Tensor) -> Tensor:
    """[N, M], the logits in these columns; 0 where a column is none of this block."""
    is_here = (columns_NM >= 0) & (columns_NM < logits_NB.shape[1])
    return logits_NB.gather(1, columns_NM.clamp(0, logits_NB.shape[1] - 1)).masked_fill_(~is_here, 0.0)


def _add_to(gradient_NB: Tensor, columns_NM: Tensor, values_NM: Tensor) -> None:
    """Add the values into their columns, those of this block."""
    is_here = (columns_NM >= 0) & (columns_NM < gradient_NB.shape[1])
    columns_NM = columns_NM.clamp(0, gradient_NB.shape[1] - 1)
    gradient_NB.scatter_add_(1, columns_NM, values_NM.masked_fill(~is_here, 0.0))


def _merged(statistics_P3N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of several parts of the vocabulary: the largest logit, the sum of exp(logit - largest), and the sum of
    exp(logit - largest) x (logit - largest). ``statistics_P3N``: the same three of each part."""
    peaks_PN, totals_PN, sums_PN = statistics_P3N.unbind(1)
    peak_N = peaks_PN.amax(dim=0)
    below_PN = peaks_PN - peak_N
    factor_PN = below_PN.exp()
    return peak_N, (totals_PN * factor_PN).sum(dim=0), ((sums_PN + below_PN * totals_PN) * factor_PN).sum(dim=0)
