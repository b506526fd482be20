"""How much of what the processors could multiply the training multiplies (MFU).

Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B: the FLOPs that a model needs for a token, 6 N + 12 L H Q T,
over those that the processors could have done meanwhile. What is computed again (activation checkpointing) or only
looked at (a forward pass without a gradient) does not count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlsys.algo.measures import Sum
from rlsys.batch.tensors import RankPart
from rlsys.config.schema import TrainSection
from rlsys.train import parallel
from rlsys.train.lora import base_of

_WIDTH = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are tried; fills the processor, takes milliseconds
_TRIED_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """FLOPs, forward and backward, of a trained sequence of T tokens: T x ``of_token`` + T^2 x ``of_pair``."""

    of_token: float
    of_pair: float

    def of(self, part: RankPart) -> Sum:
        """Of one rank's share of an optimizer step."""
        lengths = [segment.length for microbatch in part.microbatches for segment in microbatch.segments]
        flops = self.of_token * sum(lengths) + self.of_pair * sum(length * length for length in lengths)
        return Sum(torch.tensor([flops], dtype=torch.float64))


def work_of(model: Any) -> Work:
    """That of a causal language model of transformers, whole, perhaps with adapters.

    A weight that multiplies costs a token 2 FLOPs forward, 2 backward, and 2 more where it is trained itself (6 N). An
    embedding that is only looked up multiplies nothing; of experts, those count that a token goes to.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    looked_up = embedding.weight if head is None or head.weight is not embedding.weight else None
    experts = getattr(config, "num_experts_per_tok", None)
    of_token = 0.0
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter is not looked_up:
            share = experts / parameter.shape[0] if experts is not None and parameter.ndim == 3 else 1.0
            of_token += (6.0 if parameter.requires_grad else 4.0) * share * parameter.numel()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Work(of_token=of_token, of_pair=12.0 * config.num_hidden_layers * heads * width)


class Speed:
    """Args:
    model: whole, before DeepSpeed divides it.
    """

    def __init__(self, model: Any, train: TrainSection, device: str) -> None:
        self.work = work_of(model)
        is_half = train.dtype == "bfloat16" or "torch_autocast" in train.deepspeed
        own = matrix_peak(torch.bfloat16 if is_half else torch.float32, device)
        # the processes of a data-parallel rank are alike
        processes = train.processes // train.ranks
        self._peak = processes * float(parallel.total(torch.tensor(own, dtype=torch.float64), device))

    def mfu(self, metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
        """``metrics``: of a step, over all ranks. Nothing where the step trained nothing."""
        flops = metrics.get("perf/train_flops")
        return {} if flops is None else {"perf/mfu": flops / (seconds * self._peak)}


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of the best of several matrix products, with the threads that this process has."""
    width = _WIDTH[device]
    left, right = (torch.ones((width, width), dtype=dtype, device=device) for _ in range(2))
    place = torch.empty_like(left)
    best = float("inf")
    ends_at = time.perf_counter() + _TRIED_S
    while time.perf_counter() < ends_at or best == float("inf"):
        began = time.perf_counter()
        torch.mm(left, right, out=place)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2.0 * width**3 / best
