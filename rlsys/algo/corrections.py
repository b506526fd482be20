"""Off-policy corrections: the detached weight w of each token's loss, from k = proximal / behaviour.

Scope of both rows: token. Both keep the count that the loss is divided by. Legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.losses import log_ratio
from rlsys.algo.measures import EffectiveShare, Max, Mean, Measure


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWeights:
    """What a correction returns.

    Attributes:
        weights_T: [T], detached.
        measures: its metrics.
    """

    weights_T: Tensor
    measures: Mapping[str, Measure]


def none(proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor) -> TokenWeights:
    """Weight 1 for every token; how far the policies are apart is measured all the same. Arguments as in ``tis``."""
    log_k_T = _log_k(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    weights_T = torch.ones_like(log_k_T)
    return TokenWeights(weights_T=weights_T, measures=_distance(log_k_T, weights_T, mask_T))


def tis(proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor, *, cap: float = 2.0) -> TokenWeights:
    """Truncated importance sampling: w = min(k, cap), k = proximal / behaviour, detached.

    From Ionides 2008, "Truncated importance sampling"; between engine and learner as in
    https://fengyao.notion.site/off-policy-rl.

    Args:
        proximal_logprobs_T: float [T], the learner before the step.
        behaviour_logprobs_T: float [T], the engine when it sampled.
        mask_T: bool [T], tokens that carry weight.
        cap: largest weight, above 0.
    """
    assert cap > 0.0, f"cap={cap}"
    log_k_T = _log_k(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    k_T = log_k_T.exp()
    weights_T = k_T.clamp(max=cap)
    measures = _distance(log_k_T, weights_T, mask_T)
    measures["rollout_corr/is_truncated"] = Mean.of((k_T > cap).to(k_T.dtype), mask_T)
    return TokenWeights(weights_T=weights_T, measures=measures)


def _log_k(proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    assert proximal_logprobs_T.ndim == 1 and mask_T.dtype == torch.bool, f"{proximal_logprobs_T.shape} {mask_T.dtype}"
    assert proximal_logprobs_T.shape == behaviour_logprobs_T.shape == mask_T.shape, "shapes differ"
    return log_ratio(proximal_logprobs_T.detach(), behaviour_logprobs_T.detach(), mask_T)


def _distance(log_k_T: Tensor, weights_T: Tensor, mask_T: Tensor) -> dict[str, Measure]:
    """How far behaviour and proximal policy are apart, from tokens that behaviour sampled.

    ``kl`` = E[-log k] and ``kl_k3`` = E[k - 1 - log k] both estimate KL(behaviour || proximal); ``chi2`` = E[k^2] - 1.
    ``is_max`` is the largest k before any cap, ``is_mean`` and ``ess`` are of the weights as applied.
    """
    k_T = log_k_T.double().exp()
    return {
        "rollout_corr/is_mean": Mean.of(weights_T, mask_T),
        "rollout_corr/is_max": Max.of(k_T, mask_T),
        "rollout_corr/ess": EffectiveShare.of(weights_T, mask_T),
        "rollout_corr/kl": Mean.of(-log_k_T, mask_T),
        "rollout_corr/kl_k3": Mean.of(k_T - 1.0 - log_k_T, mask_T),
        "rollout_corr/chi2": Mean.of(k_T.square() - 1.0, mask_T),
    }


CORRECTIONS: dict[str, Callable[..., TokenWeights]] = {"none": none, "tis": tis}
