"""DISTILLATIONS: how far the policy is from a teacher, token by token, on the policy's own rollouts.

Reverse KL, KL(policy || teacher): the policy is drawn to what the teacher finds likely, and away from what it does not.
Both rows give nats, [T], 0 where the mask is False. Legend: T packed tokens, K candidates, the teacher's likeliest
tokens at a place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.ratios import log_ratio
from rlsys.algo.rows import Need, RowFacts, row, table

MIN_REST = 1e-6  # probability of all other tokens together is held above this: its logarithm stays finite


@row(
    RowFacts(
        source="on-policy distillation, Agarwal et al. 2023, arXiv:2306.13649, estimated on the sampled tokens",
        needs=(Need.TEACHER,),
        peers={"slime": "use_opd: coef times it off the advantages", "AReaL": "distillation, joint or pure"},
    )
)
def sampled_reverse_kl(proximal_logprobs_T: Tensor, teacher_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """log(policy) - log(teacher) of the sampled token. Taken off the advantage, where the loss gives it its gradient.

    Args:
        proximal_logprobs_T: float [T], the learner before the first step on this batch.
        teacher_logprobs_T: float [T], of the same tokens.
    """
    assert proximal_logprobs_T.shape == teacher_logprobs_T.shape == mask_T.shape, "shapes differ"
    return log_ratio(proximal_logprobs_T.detach(), teacher_logprobs_T, mask_T)


@row(
    RowFacts(
        source="on-policy distillation, Agarwal et al. 2023, arXiv:2306.13649, over the teacher's likeliest tokens",
        needs=(Need.TEACHER,),
        peers={"TRL": "GKDTrainer, lmbda 1, beta 1: over the whole vocabulary of both"},
    )
)
def topk_reverse_kl(candidate_logprobs_TK: Tensor, teacher_candidate_logprobs_TK: Tensor, mask_T: Tensor) -> Tensor:
    """sum over candidates p log(p / q) + (1 - sum p) log((1 - sum p) / (1 - sum q)), p policy and q teacher.

    All tokens that are no candidates count as one: that makes it a divergence (never negative, 0 only where both agree
    on the candidates), and a lower bound of the whole one. Gradient flows through the policy; no sampling noise.

    Args:
        candidate_logprobs_TK: float [T, K], of the policy, with gradient.
        teacher_candidate_logprobs_TK: float [T, K].
    """
    shape = candidate_logprobs_TK.shape
    assert shape == teacher_candidate_logprobs_TK.shape and shape[:1] == mask_T.shape, f"{shape} and {mask_T.shape}"
    nothing = -torch.inf  # of places without weight: no probability, so no gradient either
    policy_TK = candidate_logprobs_TK.masked_fill(~mask_T[:, None], nothing)
    teacher_TK = teacher_candidate_logprobs_TK.detach().masked_fill(~mask_T[:, None], nothing)
    probability_TK = policy_TK.exp()
    difference_TK = log_ratio(policy_TK, teacher_TK, mask_T[:, None].expand(shape))
    rest_T = (1.0 - probability_TK.sum(dim=1)).clamp(min=MIN_REST)
    teacher_rest_T = (1.0 - teacher_TK.exp().sum(dim=1)).clamp(min=MIN_REST)
    divergence_T = (probability_TK * difference_TK).sum(dim=1) + rest_T * (rest_T / teacher_rest_T).log()
    return torch.where(mask_T, divergence_T, 0.0)


DISTILLATIONS = table(sampled_reverse_kl, topk_reverse_kl)
