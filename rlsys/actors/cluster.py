"""The Ray cluster of a run: joined, or started for it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address  # what `ray.init` makes of an address
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup, placement_group

from rlsys.config.schema import Config, RaySection
from rlsys.errors import ConfigError, RlsysError

START_ONE = "local"  # Ray's word for a cluster of one's own
ROUNDING = 1e-3  # Ray counts resources in ten-thousandths
RESERVE_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 20


@contextmanager
def ray_cluster(section: RaySection, namespace: str) -> Iterator[str]:
    """Join the cluster that is named (``ray.address``, else RAY_ADDRESS), or start one; yields the dashboard's URL,
    empty where there is none. A cluster that was started here is stopped at the end.

    Whether a joined cluster wants a token is its own choice: RAY_AUTH_MODE stays as it is. One that is started here
    wants none unless RAY_AUTH_MODE says so.

    Raises:
        ConfigError: the cluster that is named cannot be joined.
    """
    # a name at all times: without one Ray joins whatever `ray start` left behind on this machine
    address = section.address or os.environ.get("RAY_ADDRESS") or START_ONE
    if address == START_ONE:
        # unset, Ray would want a token and leave one in the home folder, which then changes every later `ray start`
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options = {"namespace": namespace, "log_to_driver": True, "logging_level": "warning"}
    if address == START_ONE:
        context = ray.init(address, include_dashboard=section.dashboard, **options)
    else:
        context = _join(address, options)
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


def first_sentence(error: BaseException) -> str:
    """What an error of Ray says, without the advice that it goes on with."""
    return re.split(r"\n|\. ", str(error).strip(), maxsplit=1)[0]


def _join(address: str, options: Mapping[str, Any]) -> Any:
    try:
        # first a look whether anybody is there: Ray itself tries for ten minutes
        host, _, port = canonicalize_bootstrap_address(address).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_S).close()
        return ray.init(address, **options)
    except (OSError, ValueError, AuthenticationError) as error:
        cause = f": {str(error.__cause__).strip().splitlines()[-1]}" if error.__cause__ else ""
        raise ConfigError(
            f"ray.address or RAY_ADDRESS {address}",
            got=first_sentence(error) + cause,
            wanted="a running cluster, HOST:PORT as `ray start --head` prints it",
            remedy="correct the address, or leave both away to start a cluster for this run. Where the cluster wants a "
            "token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token with the token",
        ) from error


def check_resources(config: Config) -> None:
    """Raises ConfigError where the machines of the cluster together cannot hold the run's engines and learner."""
    machines = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    room = [{kind: machine.get(kind, 0.0) for kind in ("CPU", "GPU")} for machine in machines]
    asked = bundles(config)
    for bundle in sorted(asked, key=lambda bundle: -max(bundle.values())):
        fitting = next((own for own in room if _fits(bundle, own)), None)
        if fitting is None:
            held = "; ".join(f"{own.get('CPU', 0.0):g} CPUs, {own.get('GPU', 0.0):g} GPUs" for own in machines)
            total = {kind: sum(own.get(kind, 0.0) for own in asked) for kind in ("CPU", "GPU")}
            raise ConfigError(
                what=f"machines for {config.rollout.replicas} rollout replicas, "
                f"{config.train.processes} learner processes"
                + (" and a teacher" if config.teacher.path is not None else ""),
                got=f"{len(machines)} in the cluster, with {held}",
                wanted=f"{total['CPU']:g} CPUs and {total['GPU']:g} GPUs, each part whole on one machine",
                remedy="lower rollout.replicas, train.ranks or train.tensor_parallel, or the share of each "
                "(rollout.cpus_per_replica, train.cpus_per_rank, likewise gpus; fractions are allowed), or join a "
                "larger cluster",
            )
        for kind, amount in bundle.items():
            fitting[kind] -= amount


def _fits(bundle: Mapping[str, float], room: Mapping[str, float]) -> bool:
    return all(room.get(kind, 0.0) + ROUNDING >= amount for kind, amount in bundle.items())


def bundles(config: Config) -> list[dict[str, float]]:
    """Resources of every rollout engine, then of every learner process, then of the teacher."""
    rollout, train, teacher = config.rollout, config.train, config.teacher
    engine = _bundle(rollout.cpus_per_replica, rollout.gpus_per_replica)
    rank = _bundle(train.cpus_per_rank, train.gpus_per_rank)
    teachers = [_bundle(teacher.cpus, teacher.gpus)] if teacher.path is not None else []
    return [engine] * rollout.replicas + [rank] * train.processes + teachers


def reserve(config: Config) -> PlacementGroup:
    """Reserve all of it, on as few machines as may be. Raises RlsysError where other work holds the resources."""
    group = placement_group(bundles(config), strategy="PACK", name=f"rlsys-{config.run.name}")
    if not group.wait(RESERVE_TIMEOUT_S):
        free = ray.available_resources()
        raise RlsysError(
            f"the cluster had not {bundles(config)} free within {RESERVE_TIMEOUT_S} s; free in the cluster: "
            f"{free.get('CPU', 0.0):g} CPUs, {free.get('GPU', 0.0):g} GPUs. Other jobs hold the rest."
        )
    return group


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {kind: amount for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0} or {"CPU": ROUNDING}
