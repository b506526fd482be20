"""Log-probabilities of the tokens that stand there, by a model. The one place of the shift by one.

Legend: R rows, L tokens of a row, N = R x L, V vocabulary, K candidates at a place, M = 1 + K tokens looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsys.train.head import LeanHead

_CHUNK_ELEMENTS = 1 << 23  # 32 MiB of float32 per temporary: small beside logits worth cutting, large beside a call


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Token-aligned, float32 [R, L]; 0 at the first token of each segment, which nothing predicts.

    Attributes:
        logprobs: with gradient where the logits have one.
        entropy: nats, of the distribution that each token was drawn from; with gradient where that was asked for.
        candidate_logprobs: [R, L, K], of the candidates at the place of each token, with gradient.
    """

    logprobs: Tensor
    entropy: Tensor
    candidate_logprobs: Tensor


def logprobs_by(
    forward: Callable[..., Any],
    head: LeanHead | None,
    token_ids: Tensor,
    position_ids: Tensor,
    *,
    temperature: float,
    candidate_ids: Tensor | None = None,
    entropy_gradient: bool = False,
) -> TokenLogprobs:
    """What ``forward``, a causal language model of transformers, says of the tokens.

    No attention mask is given: transformers then derives it from the restarting positions (a mask of ones would let
    packed samples see one another).

    Args:
        head: of that model, where it is lean; None: from whole logits. The others as of ``token_logprobs``.
    """
    if head is None:
        logits = forward(input_ids=token_ids, position_ids=position_ids, use_cache=False).logits
        return token_logprobs(
            logits,
            token_ids,
            position_ids,
            temperature=temperature,
            candidate_ids=candidate_ids,
            entropy_gradient=entropy_gradient,
        )
    with head.looking_up(_targets(token_ids, candidate_ids), temperature, entropy_gradient):
        answers = forward(input_ids=token_ids, position_ids=position_ids, use_cache=False).logits
    return _at_their_tokens(answers[..., :-1], answers[..., -1], position_ids)


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    position_ids: Tensor,
    *,
    temperature: float,
    candidate_ids: Tensor | None = None,
    entropy_gradient: bool = False,
) -> TokenLogprobs:
    """log softmax(logits[:, t - 1] / temperature)[token_ids[:, t]] for every token t that does not begin a segment.

    Needs, beside the logits and their gradient, a few chunks of 32 MiB: neither the scaled logits nor their softmax
    are ever whole in memory.

    Args:
        logits: [R, L, V], any floating dtype; ``logits[:, t]`` predicts token t + 1.
        token_ids: int64 [R, L].
        position_ids: int64 [R, L], 0 where a segment begins.
        temperature: what the engine sampled with, above 0.
        candidate_ids: int64 [R, L, K], further tokens that are looked up at the place of each; None: none.
        entropy_gradient: whether a gradient flows through the entropy.
    """
    assert logits.ndim == 3 and logits.shape[:2] == token_ids.shape == position_ids.shape, f"{logits.shape}"
    assert temperature > 0.0, f"temperature={temperature}"
    logprobs_NM, entropy_N = _TargetLogprobs.apply(
        logits.flatten(0, 1), _targets(token_ids, candidate_ids).flatten(0, 1), temperature, entropy_gradient
    )
    return _at_their_tokens(
        logprobs_NM.unflatten(0, token_ids.shape), entropy_N.unflatten(0, token_ids.shape), position_ids
    )


def _targets(token_ids: Tensor, candidate_ids: Tensor | None) -> Tensor:
    """[R, L, M], at each token those that are looked up in what the model says there: the next one, its candidates."""
    looked_up = token_ids.unsqueeze(2)
    if candidate_ids is not None:
        assert candidate_ids.shape[:2] == token_ids.shape, f"{candidate_ids.shape}"
        looked_up = torch.cat([looked_up, candidate_ids], dim=2)
    return torch.roll(looked_up, -1, dims=1)


def _at_their_tokens(logprobs_RLM: Tensor, entropy_RL: Tensor, position_ids: Tensor) -> TokenLogprobs:
    begins = position_ids == 0
    aligned = align(logprobs_RLM, begins)
    return TokenLogprobs(
        logprobs=aligned[..., 0], entropy=align(entropy_RL, begins), candidate_logprobs=aligned[..., 1:]
    )


def align(predicted: Tensor, begins: Tensor) -> Tensor:
    """What stands at the token before, moved to the token that it is about; 0 where a segment begins.

    Args:
        predicted: [R, L] or [R, L, M], at each token what the model says there of the next one.
        begins: bool [R, L], first tokens of segments.
    """
    mask = begins if predicted.ndim == begins.ndim else begins.unsqueeze(-1)
    return torch.roll(predicted, 1, dims=1).masked_fill(mask, 0.0)


class _TargetLogprobs(torch.autograd.Function):
    """Per row of logits: log-probabilities of the targets, and entropy. Works in chunks of rows; the backward pass
    computes the softmax again instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_NM: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs, normalisers, entropies = [], [], []
        for chunk_CV, targets_CM in _chunks(logits_NV, targets_NM):
            scaled_CV = chunk_CV.float() / temperature
            normaliser_C = scaled_CV.logsumexp(dim=-1)
            logprobs.append(scaled_CV.gather(1, targets_CM) - normaliser_C.unsqueeze(1))
            probabilities_CV = (scaled_CV - normaliser_C.unsqueeze(1)).exp_()
            entropies.append(normaliser_C - probabilities_CV.mul_(scaled_CV).sum(dim=-1))
            normalisers.append(normaliser_C)
        entropy_N = torch.cat(entropies)
        ctx.save_for_backward(logits_NV, targets_NM, torch.cat(normalisers), entropy_N if entropy_gradient else None)
        ctx.temperature = temperature
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """d logprob_m / d scaled_v = [v = m] - p_v, and d entropy / d scaled_v = -p_v (log p_v + entropy)."""
        logits_NV, targets_NM, normaliser_N, entropy_N = ctx.saved_tensors
        of_logprobs_NM = gradients[0] / ctx.temperature
        of_entropy_N = None if entropy_N is None else gradients[1] / ctx.temperature
        result_NV = torch.empty_like(logits_NV)
        start = 0
        for chunk_CV, targets_CM in _chunks(logits_NV, targets_NM):
            here = slice(start, start + len(targets_CM))
            logprobs_CV = (chunk_CV.float() / ctx.temperature).sub_(normaliser_N[here].unsqueeze(1))
            total_C1 = of_logprobs_NM[here].sum(dim=1, keepdim=True)
            if of_entropy_N is None:
                gradient_CV = logprobs_CV.exp_().mul_(-total_C1)
            else:
                of_entropy_C1 = of_entropy_N[here].unsqueeze(1)
                shifted_CV = (logprobs_CV + entropy_N[here].unsqueeze(1)).mul_(of_entropy_C1).add_(total_C1)
                gradient_CV = logprobs_CV.exp_().mul_(shifted_CV).neg_()
            gradient_CV.scatter_add_(1, targets_CM, of_logprobs_NM[here])
            result_NV[here] = gradient_CV
            start = here.stop
        return result_NV, None, None, None


def _chunks(logits_NV: Tensor, targets_NM: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK_ELEMENTS // logits_NV.shape[1])
    return list(zip(logits_NV.split(rows), targets_NM.split(rows), strict=True))
