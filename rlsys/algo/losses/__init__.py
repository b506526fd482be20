"""POLICY_LOSSES: losses of tokens. They return losses, never means: the caller divides once by the global count."""

from rlsys.algo.losses.base import TokenLosses
from rlsys.algo.losses.clip import dapo_clip, dual_clip, opsm_clip, ppo_clip, two_sided_clip, vapo_clip
from rlsys.algo.losses.covariance import clip_cov, kl_cov
from rlsys.algo.losses.sequence import gmpo, gspo, gspo_token
from rlsys.algo.losses.soft import dro, sapo
from rlsys.algo.losses.weighted import cispo, dppo_kl, dppo_tv, reinforce, topr
from rlsys.algo.rows import table

POLICY_LOSSES = table(
    reinforce,
    ppo_clip,
    dapo_clip,
    dual_clip,
    two_sided_clip,
    opsm_clip,
    vapo_clip,
    gspo,
    gspo_token,
    gmpo,
    cispo,
    topr,
    dppo_tv,
    dppo_kl,
    sapo,
    dro,
    clip_cov,
    kl_cov,
)

__all__ = ["POLICY_LOSSES", "TokenLosses", "ppo_clip"]
