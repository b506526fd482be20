"""Advantages, losses and corrections, each reachable by its name from the table of its kind. Pure torch."""

from rlsys.algo.advantages import ADVANTAGES
from rlsys.algo.corrections import CORRECTIONS
from rlsys.algo.losses import POLICY_LOSSES

__all__ = ["ADVANTAGES", "CORRECTIONS", "POLICY_LOSSES"]
