"""Every formula of the algorithms, reachable by its name from the table of its kind. Pure torch."""

from rlsys.algo.advantages import ADVANTAGES
from rlsys.algo.aggregation import AGGREGATIONS
from rlsys.algo.coefficients import COEFFICIENTS
from rlsys.algo.corrections import CORRECTIONS
from rlsys.algo.distillation import DISTILLATIONS
from rlsys.algo.kl import KL_ESTIMATORS
from rlsys.algo.losses import POLICY_LOSSES
from rlsys.algo.selection import SELECTIONS
from rlsys.algo.shaping import SHAPINGS
from rlsys.algo.value import VALUE_LOSSES

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "COEFFICIENTS",
    "CORRECTIONS",
    "DISTILLATIONS",
    "KL_ESTIMATORS",
    "POLICY_LOSSES",
    "SELECTIONS",
    "SHAPINGS",
    "VALUE_LOSSES",
]
