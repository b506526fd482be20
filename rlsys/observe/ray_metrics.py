"""Metrics as Ray gauges, for Prometheus and Grafana. The only file of this package that imports ray.

Ray exports them as ``ray_rlsys_<name>`` with the tag ``run_id``: gauges of dead processes stay in the endpoint for
minutes, and only the tag tells the runs apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


def gauge_name(metric: str) -> str:
    """Example: ``gauge_name("val-core/sums/acc/mean@1")`` is ``"rlsys_val_core_sums_acc_mean_1"``."""
    return "rlsys_" + re.sub(r"[^A-Za-z0-9_]", "_", metric)


class RayGauges:
    """One gauge per metric, made when the metric first comes."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Numbers that are not finite are left out: the gauge keeps its last one."""
        for metric, value in values.items():
            if math.isfinite(value):
                self._gauge(metric).set(float(value))

    def _gauge(self, metric: str) -> Gauge:
        if metric not in self._gauges:
            gauge = Gauge(gauge_name(metric), description=f"rlsys metric {metric}", tag_keys=("run_id",))
            self._gauges[metric] = gauge.set_default_tags({"run_id": self._run_id})
        return self._gauges[metric]
