"""CORRECTIONS: what the difference between the policy that sampled and the one that learns does to a token.

A row weights (and keeps the count) or rejects (and shrinks it): ``facts_of(row).keeps_count``.
"""

from rlsys.algo.corrections.base import TokenWeights
from rlsys.algo.corrections.batch import m2po, normalised_tis
from rlsys.algo.corrections.rejection import (
    reject_binary_kl,
    reject_difference,
    reject_k1,
    reject_k2,
    reject_k3,
    veto,
)
from rlsys.algo.corrections.weights import (
    aipo,
    icepop,
    importance,
    kpop,
    mis,
    none,
    opsm,
    policy_icepop,
    seq_mask_tis,
    tis,
)
from rlsys.algo.rows import table

CORRECTIONS = table(
    none,
    tis,
    importance,
    aipo,
    icepop,
    policy_icepop,
    kpop,
    mis,
    seq_mask_tis,
    opsm,
    normalised_tis,
    m2po,
    reject_k1,
    reject_k2,
    reject_k3,
    reject_binary_kl,
    reject_difference,
    veto,
)

__all__ = ["CORRECTIONS", "TokenWeights", "tis"]
