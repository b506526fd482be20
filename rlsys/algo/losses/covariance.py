"""Losses that treat the few tokens with the largest covariance of advantage and log-probability apart, since these
eat the entropy: Clip-Cov and KL-Cov. Which tokens these are is settled over the whole batch.

Covariance of a token: (A - mean A) (log(policy) - mean log(policy)), the means over the weighted tokens of the batch.
Arguments as in ``losses/clip.py``. Legend: T packed tokens, N weighted tokens of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.losses.base import TokenLosses, clipped_loss, prepared, ratio_measures
from rlsys.algo.prepass import Prepass, Settled, Statistics
from rlsys.algo.rows import RowFacts, Scope, row


def _covariance(advantages: Tensor, logprobs: Tensor, settled: Settled) -> Tensor:
    """float64; ``settled`` holds both means."""
    return (advantages.double() - settled["mean_advantage"]) * (logprobs.double() - settled["mean_logprob"])


def _means(gathered: Statistics) -> dict[str, Tensor]:
    return {
        "mean_advantage": gathered.gathered["advantages"].mean(),
        "mean_logprob": gathered.gathered["logprobs"].mean(),
    }


def _num_chosen(share: float, num_tokens: int) -> int:
    return max(1, int(share * num_tokens))


def _collect_clip(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    token_draws_T: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Statistics:
    with torch.no_grad():
        log_ratio_T, kept_advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
        _, clipped_T = clipped_loss(log_ratio_T, kept_advantages_T, eps_low, eps_high)
    columns = {"advantages": advantages_T, "logprobs": policy_logprobs_T, "draws": token_draws_T, "clipped": clipped_T}
    return Statistics(gathered={name: column.detach()[mask_T].double() for name, column in columns.items()})


def _settle_clip(
    statistics: Statistics, *, share: float = 2e-4, cov_low: float = 1.0, cov_high: float = 5.0
) -> Settled:
    """The means, and the draw up to which a token within the bounds is taken: those with the lowest draws are."""
    settled = _means(statistics)
    columns = statistics.gathered
    covariance_N = _covariance(columns["advantages"], columns["logprobs"], settled)
    is_open_N = (covariance_N > cov_low) & (covariance_N < cov_high) & (columns["clipped"] == 0.0)
    draws = columns["draws"][is_open_N]
    chosen = min(_num_chosen(share, covariance_N.numel()), draws.numel())
    nothing = covariance_N.new_tensor(-1.0)
    return {**settled, "last_draw": draws.kthvalue(chosen).values if chosen else nothing}


@row(
    RowFacts(
        source="Clip-Cov, Cui et al. 2025, arXiv:2505.22617",
        scope=Scope.BATCH,
        is_ratio_loss=True,
        peers={
            "verl": "clip_cov, ratio 2e-4, bounds 1 and 5; draws anew in each microbatch, and at random",
            "SkyRL": "clip_cov",
        },
        prepass=Prepass(collect=_collect_clip, settle=_settle_clip),
    )
)
def clip_cov(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    token_draws_T: Tensor,
    settled: Settled,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> TokenLosses:
    """``ppo_clip``, less a few tokens drawn from those with a covariance within (cov_low, cov_high).

    Args:
        token_draws_T: float64 [T] in [0, 1): the tokens with the lowest are taken.
        share: of the batch's tokens, at least one token, as far as there are any.
    """
    assert 0.0 < share <= 1.0 and cov_low < cov_high, f"share={share}, cov_low={cov_low}, cov_high={cov_high}"
    covariance_T = _covariance(advantages_T, policy_logprobs_T.detach(), settled)
    drawn_T = mask_T & (covariance_T > cov_low) & (covariance_T < cov_high) & (token_draws_T <= settled["last_draw"])
    del covariance_T  # a fifth of what the loss keeps
    log_ratio_T, kept_advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    loss_T, clipped_T = clipped_loss(log_ratio_T, kept_advantages_T, eps_low, eps_high)
    taken_T = drawn_T & ~clipped_T
    return TokenLosses(
        loss_T=torch.where(taken_T, 0.0, loss_T), measures=ratio_measures(log_ratio_T, mask_T, clipped_T=taken_T)
    )


def _collect_kl(policy_logprobs_T: Tensor, advantages_T: Tensor, mask_T: Tensor) -> Statistics:
    columns = {"advantages": advantages_T, "logprobs": policy_logprobs_T}
    return Statistics(gathered={name: column.detach()[mask_T].double() for name, column in columns.items()})


def _settle_kl(statistics: Statistics, *, share: float = 2e-4) -> Settled:
    """The means, and the covariance from which on a token is taken."""
    settled = _means(statistics)
    covariance_N = _covariance(statistics.gathered["advantages"], statistics.gathered["logprobs"], settled)
    if not covariance_N.numel():
        return {**settled, "least": covariance_N.new_tensor(torch.inf)}
    return {**settled, "least": covariance_N.topk(_num_chosen(share, covariance_N.numel())).values[-1]}


@row(
    RowFacts(
        source="KL-Cov, Cui et al. 2025, arXiv:2505.22617",
        scope=Scope.BATCH,
        is_ratio_loss=True,
        peers={"verl": "kl_cov, ratio 2e-4, ppo_kl_coef 1; the largest of each microbatch", "SkyRL": "kl_cov"},
        prepass=Prepass(collect=_collect_kl, settle=_settle_kl),
    )
)
def kl_cov(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    settled: Settled,
    *,
    share: float = 2e-4,
    kl_coef: float = 1.0,
) -> TokenLosses:
    """-A r, and + kl_coef |log r| on the tokens with the largest covariances of the batch.

    Args:
        share: of the batch's tokens, at least one token; those that share the last place are taken together.
        kl_coef: 0 or more.
    """
    assert 0.0 < share <= 1.0 and kl_coef >= 0.0, f"share={share}, kl_coef={kl_coef}"
    taken_T = mask_T & (_covariance(advantages_T, policy_logprobs_T.detach(), settled) >= settled["least"])
    log_ratio_T, kept_advantages_T = prepared(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    loss_T = -kept_advantages_T * log_ratio_T.exp() + torch.where(taken_T, kl_coef * log_ratio_T.abs(), 0.0)
    return TokenLosses(loss_T=loss_T, measures=ratio_measures(log_ratio_T, mask_T, clipped_T=taken_T))
