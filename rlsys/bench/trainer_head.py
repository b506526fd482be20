"""Log-probabilities straight from hidden states, against those from whole logits: memory and time, forward and
backward.

Legend: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from rlsys.bench.objective import peak_bytes
from rlsys.train.head import LeanHead


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSizes:
    vocab_size: int
    width: int
    tokens: int
    repeats: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadFigures:
    """Bytes beyond the inputs, the gradients of hidden states and weight included; seconds, the median of a few."""

    lean_bytes: int
    naive_bytes: int
    lean_s: float
    naive_s: float


def measure_head(sizes: HeadSizes, dtype: torch.dtype) -> HeadFigures:
    """Every token has a gradient: the most that the lean form may have to compute."""
    torch.manual_seed(0)
    head = torch.nn.Linear(sizes.width, sizes.vocab_size, bias=False).to(dtype)
    hidden_ND = torch.randn(sizes.tokens, sizes.width).to(dtype).requires_grad_()
    targets_N = torch.randint(sizes.vocab_size, (sizes.tokens,))
    lean_head = LeanHead(head)

    def lean() -> Tensor:
        with lean_head.looking_up(targets_N.view(1, -1, 1), 1.0, False):
            return head(hidden_ND.unsqueeze(0))[0, :, 0]

    def naive() -> Tensor:
        logits_NV = F.linear(hidden_ND, head.weight)
        return torch.log_softmax(logits_NV.float(), dim=-1).gather(1, targets_N.unsqueeze(1)).squeeze(1)

    def whole(logprobs: Callable[[], Tensor]) -> None:
        logprobs().sum().backward()
        hidden_ND.grad = head.weight.grad = None

    seconds: dict[Callable[[], Tensor], list[float]] = {lean: [], naive: []}
    memory = {logprobs: peak_bytes(partial(whole, logprobs)) for logprobs in seconds}  # warms up, too
    for _ in range(sizes.repeats):
        for logprobs, taken in seconds.items():
            began = perf_counter()
            whole(logprobs)
            taken.append(perf_counter() - began)
    return HeadFigures(
        lean_bytes=memory[lean], naive_bytes=memory[naive], lean_s=median(seconds[lean]), naive_s=median(seconds[naive])
    )
