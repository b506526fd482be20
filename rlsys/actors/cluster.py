"""The Ray cluster of a run: joined, or started for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rlsys.config.schema import Config, RaySection
from rlsys.errors import ConfigError


@contextmanager
def ray_cluster(section: RaySection, namespace: str) -> Iterator[str]:
    """Join the cluster that is named (``ray.address``, else RAY_ADDRESS), or start one; yields the dashboard's URL,
    empty where there is none. A cluster that was started here is stopped at the end."""
    address = section.address or os.environ.get("RAY_ADDRESS")
    # unset, Ray decides by what lies in the home folder whether a token is needed; the same run must not depend on it
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    context = ray.init(
        address=address,
        namespace=namespace,
        include_dashboard=section.dashboard if address is None else None,
        log_to_driver=True,
        logging_level="warning",
    )
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


def check_resources(config: Config) -> None:
    """Raises ConfigError where the cluster cannot hold the run's actors."""
    asked = {
        "CPU": config.rollout.replicas * config.rollout.cpus_per_replica
        + config.train.ranks * config.train.cpus_per_rank,
        "GPU": config.rollout.replicas * config.rollout.gpus_per_replica
        + config.train.ranks * config.train.gpus_per_rank,
    }
    there = ray.cluster_resources()
    for kind, amount in asked.items():
        if amount > there.get(kind, 0.0) + 1e-6:
            unit = kind.lower()
            raise ConfigError(
                what=f"{kind}s for {config.rollout.replicas} rollout replicas and {config.train.ranks} learner ranks",
                got=f"{there.get(kind, 0.0):g} in the cluster",
                wanted=f"{amount:g}",
                remedy=f"lower rollout.replicas or train.ranks, or the share of each (rollout.{unit}s_per_replica, "
                f"train.{unit}s_per_rank; fractions are allowed), or join a larger cluster",
            )
