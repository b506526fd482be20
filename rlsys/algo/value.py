"""VALUE_LOSSES: losses of a critic, per token. Legend: T packed tokens.

Arguments of every row: values_T float [T], what the critic says now, with gradient; returns_T float [T], what it is to
predict; mask_T bool [T]. Results are sums-to-be as of the policy losses: the caller divides once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.losses.base import TokenLosses
from rlsys.algo.measures import Mean, Measure
from rlsys.algo.rows import Need, RowFacts, row, table


def _error(values_T: Tensor, returns_T: Tensor, mask_T: Tensor) -> Tensor:
    """value - return, 0 where the mask is False."""
    assert values_T.ndim == 1 and mask_T.dtype == torch.bool, f"{values_T.shape} {mask_T.dtype}"
    assert values_T.shape == returns_T.shape == mask_T.shape, "shapes differ"
    return torch.where(mask_T, values_T - returns_T.detach(), 0.0)


def _measures(values_T: Tensor, returns_T: Tensor, mask_T: Tensor) -> dict[str, Measure]:
    return {"critic/vpred_mean": Mean.of(values_T, mask_T), "critic/returns/mean": Mean.of(returns_T, mask_T)}


@row(
    RowFacts(
        source="PPO, Schulman et al. 2017, arXiv:1707.06347",
        needs=(Need.CRITIC,),
        peers={"verl": "cliprange_value large", "OpenRLHF": "value_clip unset"},
    )
)
def squared_error(values_T: Tensor, returns_T: Tensor, mask_T: Tensor) -> TokenLosses:
    """(V - R)^2 / 2."""
    error_T = _error(values_T, returns_T, mask_T)
    return TokenLosses(loss_T=0.5 * error_T.square(), measures=_measures(values_T, returns_T, mask_T))


@row(
    RowFacts(
        source="PPO's reference code, https://github.com/openai/baselines (ppo2)",
        needs=(Need.CRITIC,),
        peers={
            "verl": "cliprange_value 0.5",
            "OpenRLHF": "value_clip 0.5",
            "slime": "value_clip 0.2",
            "SkyRL": "value_clip 0.2",
        },
    )
)
def clipped_squared_error(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, mask_T: Tensor, *, eps: float = 0.2
) -> TokenLosses:
    """max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2.

    Args:
        old_values_T: float [T], what the critic said before the first step on this batch.
        eps: how far a value may move in one batch, in units of the reward.
    """
    assert eps > 0.0, f"eps={eps}"
    free_T = _error(values_T, returns_T, mask_T)
    old_T = torch.where(mask_T, old_values_T.detach(), 0.0)
    held_T = torch.minimum(torch.maximum(torch.where(mask_T, values_T, 0.0), old_T - eps), old_T + eps)
    bounded_T = _error(held_T, returns_T, mask_T)
    clipped_T = bounded_T.detach().square() > free_T.detach().square()
    measures = {
        **_measures(values_T, returns_T, mask_T),
        "critic/vf_clipfrac": Mean.share(clipped_T, mask_T),
    }
    return TokenLosses(loss_T=0.5 * torch.maximum(free_T.square(), bounded_T.square()), measures=measures)


VALUE_LOSSES = table(squared_error, clipped_squared_error)
