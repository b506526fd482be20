"""Advantages of tokens, from rewards on tokens: returns, a greedy baseline, and GAE with a critic.

Tokens without weight (prompt, environment, padding) are stepped over as if they were not there: no discount passes
over them. A reward that stands on one counts for the last weighted token before it, since that is what earned it; one
before the first weighted token is nobody's. Legend: T packed tokens, S sequences, N weighted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.prepass import Prepass, Settled, Statistics, moments, settle_moments, whiten
from rlsys.algo.rows import Need, RowFacts, Scope, row
from rlsys.algo.segments import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenAdvantages:
    """What a row of tokens returns.

    Attributes:
        advantages_T: [T], 0 on tokens without weight.
        returns_T: [T], what a critic is to predict; 0 on tokens without weight.
    """

    advantages_T: Tensor
    returns_T: Tensor


def rewards_on_tokens(rewards_S: Tensor, mask_T: Tensor, segments: Segments) -> Tensor:
    """Each sequence's reward on its last weighted token, 0 elsewhere, [T]. A sequence without weight gets none."""
    positions_T = torch.arange(segments.num_tokens, device=mask_T.device)
    last_S = segments.max(positions_T.double(), mask_T)
    return torch.where(mask_T & (positions_T == segments.spread(last_S)), segments.spread(rewards_S), 0.0)


def _earned(rewards_T: Tensor, mask_T: Tensor, segments: Segments) -> Tensor:
    """The rewards of the weighted tokens, [N]: their own and those on tokens behind them, up to the next one."""
    _check(rewards_T, mask_T, segments)
    number_T = mask_T.cumsum(0) - 1  # of the last weighted token at or before
    before_S = number_T[segments.starts_S] - mask_T[segments.starts_S].long()
    is_earned_T = number_T > segments.spread(before_S)
    zeros_N = torch.zeros(int(mask_T.sum()), dtype=rewards_T.dtype, device=rewards_T.device)
    return zeros_N.index_add(0, number_T[is_earned_T], rewards_T[is_earned_T])


def _placed(values_N: Tensor, mask_T: Tensor) -> Tensor:
    """[N] to [T], 0 on tokens without weight."""
    return torch.zeros(mask_T.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_T, values_N)


def _returns(rewards_T: Tensor, mask_T: Tensor, segments: Segments, gamma: float) -> Tensor:
    assert 0.0 <= gamma <= 1.0, f"gamma={gamma}"
    earned_N = _earned(rewards_T, mask_T, segments)
    return _placed(segments.only(mask_T).suffix_sum(earned_N, gamma), mask_T)


def _check(values_T: Tensor, mask_T: Tensor, segments: Segments) -> None:
    assert values_T.ndim == 1 and values_T.is_floating_point(), f"{values_T.shape} {values_T.dtype}"
    assert mask_T.dtype == torch.bool and mask_T.shape == values_T.shape, f"{mask_T.shape} {mask_T.dtype}"
    assert segments.num_tokens == values_T.numel(), f"segments of {segments.num_tokens} tokens"


def _collect_returns(rewards_T: Tensor, mask_T: Tensor, segments: Segments, *, gamma: float = 1.0) -> Statistics:
    return moments(_returns(rewards_T, mask_T, segments, gamma), mask_T.double())


@row(
    RowFacts(
        source="REINFORCE++, Hu et al. 2025, arXiv:2501.03262",
        scope=Scope.BATCH,
        gives="token",
        peers={
            "verl": "reinforce_plus_plus; its return stops at environment tokens",
            "OpenRLHF": "reinforce",
        },
        prepass=Prepass(collect=_collect_returns, settle=settle_moments),
    )
)
def reinforce_pp(
    rewards_T: Tensor, mask_T: Tensor, segments: Segments, settled: Settled, *, gamma: float = 1.0
) -> TokenAdvantages:
    """A_t = whiten(sum over k >= t of gamma^(k - t) r_k) over the weighted tokens of the batch.

    The paper takes a penalty on the divergence from the reference into the rewards: ``penalised_rewards``.
    """
    returns_T = _returns(rewards_T, mask_T, segments, gamma)
    advantages_T = torch.where(mask_T, whiten(returns_T, settled), 0.0)
    return TokenAdvantages(advantages_T=advantages_T, returns_T=returns_T)


@row(
    RowFacts(
        source="ReMax, Li et al. 2023, arXiv:2310.10505",
        scope=Scope.SEQUENCE,
        gives="token",
        needs=(Need.GREEDY_ROLLOUT,),
        peers={"verl": "remax", "Trinity": "remax"},
    )
)
def remax(rewards_T: Tensor, greedy_rewards_S: Tensor, mask_T: Tensor, segments: Segments) -> TokenAdvantages:
    """A_t = sum over k >= t of r_k - reward of the greedy rollout of the same prompt."""
    assert greedy_rewards_S.shape == segments.starts_S.shape, f"greedy rewards: {greedy_rewards_S.shape}"
    returns_T = _returns(rewards_T, mask_T, segments, 1.0)
    advantages_T = torch.where(mask_T, returns_T - segments.spread(greedy_rewards_S), 0.0)
    return TokenAdvantages(advantages_T=advantages_T, returns_T=returns_T)


def _gae(
    rewards_T: Tensor, values_T: Tensor, mask_T: Tensor, segments: Segments, gamma: float, lam: float
) -> TokenAdvantages:
    assert 0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0, f"gamma={gamma}, lam={lam}"
    _check(values_T, mask_T, segments)
    weighted = segments.only(mask_T)
    values_N = values_T.detach()[mask_T]
    is_last_N = torch.zeros_like(values_N, dtype=torch.bool)
    is_last_N[weighted.starts_S + weighted.lengths_S - 1] = True
    next_N = torch.where(is_last_N, 0.0, torch.roll(values_N, -1))
    errors_N = _earned(rewards_T, mask_T, segments) + gamma * next_N - values_N
    advantages_N = weighted.suffix_sum(errors_N, gamma * lam)
    return TokenAdvantages(
        advantages_T=_placed(advantages_N, mask_T), returns_T=_placed(advantages_N + values_N, mask_T)
    )


def _collect_gae(
    rewards_T: Tensor,
    values_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Statistics:
    return moments(_gae(rewards_T, values_T, mask_T, segments, gamma, lam).advantages_T, mask_T.double())


@row(
    RowFacts(
        source="GAE, Schulman et al. 2015, arXiv:1506.02438",
        scope=Scope.BATCH,
        gives="token",
        needs=(Need.CRITIC,),
        peers={
            "verl": "gae, gamma 1, lam 1; steps over environment tokens as here",
            "OpenRLHF": "gae, gamma 1, lambd 1",
            "AReaL": "discount 1, gae_lambda 1; whitened only where adv_norm is set",
            "SkyRL": "gae",
            "slime": "ppo",
            "ROLL": "gae, lambd 0.95",
        },
        prepass=Prepass(collect=_collect_gae, settle=settle_moments),
    )
)
def gae(
    rewards_T: Tensor,
    values_T: Tensor,
    mask_T: Tensor,
    segments: Segments,
    settled: Settled,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whitened: bool = True,
) -> TokenAdvantages:
    """A_t = sum over k >= t of (gamma lam)^(k - t) d_k with d_t = r_t + gamma V_(t+1) - V_t; returns are A + V.

    The value behind the last weighted token is 0. Advantages are whitened over the weighted tokens of the batch,
    returns never are.

    Args:
        rewards_T, values_T: float [T]; V_t is the critic's estimate before token t is sampled.
        gamma: discount.
        lam: 1 trusts the rewards alone, 0 the critic alone.
        whitened: False leaves the whitening out.
    """
    plain = _gae(rewards_T, values_T, mask_T, segments, gamma, lam)
    if not whitened:
        return plain
    advantages_T = torch.where(mask_T, whiten(plain.advantages_T, settled), 0.0)
    return TokenAdvantages(advantages_T=advantages_T, returns_T=plain.returns_T)
