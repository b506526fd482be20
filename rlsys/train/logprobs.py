"""Log-probabilities of the tokens that stand there, from logits. The one place of the shift by one.

Legend: R rows, L tokens of a row, N = R x L, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 23  # 32 MiB of float32 per temporary: small beside logits worth cutting, large beside a call


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Token-aligned, float32 [R, L]; 0 at the first token of each segment, which nothing predicts.

    Attributes:
        logprobs: with gradient where the logits have one.
        entropy: detached, nats, of the distribution that each token was drawn from.
    """

    logprobs: Tensor
    entropy: Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, position_ids: Tensor, *, temperature: float) -> TokenLogprobs:
    """log softmax(logits[:, t - 1] / temperature)[token_ids[:, t]] for every token t that does not begin a segment.

    Needs, beside the logits and their gradient, a few chunks of 32 MiB: neither the scaled logits nor their softmax
    are ever whole in memory.

    Args:
        logits: [R, L, V], any floating dtype; ``logits[:, t]`` predicts token t + 1.
        token_ids: int64 [R, L].
        position_ids: int64 [R, L], 0 where a segment begins.
        temperature: what the engine sampled with, above 0.
    """
    assert logits.ndim == 3 and logits.shape[:2] == token_ids.shape == position_ids.shape, f"{logits.shape}"
    assert temperature > 0.0, f"temperature={temperature}"
    num_rows, length, vocabulary = logits.shape
    targets_N = torch.roll(token_ids, -1, dims=1).reshape(-1)
    logprobs_N, entropy_N = _TargetLogprobs.apply(logits.reshape(-1, vocabulary), targets_N, temperature)
    begins = position_ids == 0

    def align(values_N: Tensor) -> Tensor:
        shifted = torch.roll(values_N.reshape(num_rows, length), 1, dims=1)
        return shifted.masked_fill(begins, 0.0)

    return TokenLogprobs(logprobs=align(logprobs_N), entropy=align(entropy_N))


class _TargetLogprobs(torch.autograd.Function):
    """Per row of logits: log-probability of the target, and entropy (no gradient). Works in chunks of rows; the
    backward pass computes the softmax again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, normalisers, entropies = [], [], []
        for chunk_CV, targets_C in _chunks(logits_NV, targets_N):
            scaled_CV = chunk_CV.float() / temperature
            normaliser_C = scaled_CV.logsumexp(dim=-1)
            logprobs.append(scaled_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1) - normaliser_C)
            probabilities_CV = (scaled_CV - normaliser_C.unsqueeze(1)).exp_()
            entropies.append(normaliser_C - probabilities_CV.mul_(scaled_CV).sum(dim=-1))
            normalisers.append(normaliser_C)
        entropy_N = torch.cat(entropies)
        ctx.save_for_backward(logits_NV, targets_N, torch.cat(normalisers))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, normaliser_N = ctx.saved_tensors
        scale_N = gradients[0] / ctx.temperature
        result_NV = torch.empty_like(logits_NV)
        start = 0
        for chunk_CV, targets_C in _chunks(logits_NV, targets_N):
            here = slice(start, start + len(targets_C))
            scale_C1 = scale_N[here].unsqueeze(1)
            scaled_CV = chunk_CV.float() / ctx.temperature
            gradient_CV = scaled_CV.sub_(normaliser_N[here].unsqueeze(1)).exp_().mul_(-scale_C1)
            gradient_CV.scatter_add_(1, targets_C.unsqueeze(1), scale_C1)
            result_NV[here] = gradient_CV
            start = here.stop
        return result_NV, None, None


def _chunks(logits_NV: Tensor, targets_N: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK_ELEMENTS // logits_NV.shape[1])
    return list(zip(logits_NV.split(rows), targets_N.split(rows), strict=True))
