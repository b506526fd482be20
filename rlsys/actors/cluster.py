"""The Ray cluster of a run: joined, or started for it."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address  # what `ray.init` makes of an address
from ray._private.state import state  # Ray's public calls tell what is free in the whole cluster only
from ray.exceptions import AuthenticationError
from ray.util.placement_group import NODE_ID_LABEL_KEY, PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.actors.layout import ROUNDING, Bundle, lay_out, most_engines
from rlsys.config.schema import Config, RaySection
from rlsys.errors import ConfigError, EngineLost, RlsysError

START_ONE = "local"  # Ray's word for a cluster of one's own
RESERVE_TIMEOUT_S = 60
RESERVE_PERIOD_S = 1
HOLD_TIMEOUT_S = 20
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
    """Raises ConfigError where the machines of the cluster together cannot hold the run's engines (one at least where
    their number is open) and learner."""
    machines = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    asked = [engine_bundle(config)] * (config.rollout.num_replicas or 1) + other_bundles(config)
    if lay_out(asked, {str(index): machine for index, machine in enumerate(machines)}) is not None:
        return
    held = "; ".join(f"{own.get('CPU', 0.0):g} CPUs, {own.get('GPU', 0.0):g} GPUs" for own in machines)
    total = {kind: sum(own.get(kind, 0.0) for own in asked) for kind in ("CPU", "GPU")}
    replicas = config.rollout.num_replicas or "the first of the"
    raise ConfigError(
        what=f"machines for {replicas} rollout replicas, {config.train.processes} learner processes"
        + (" and a teacher" if config.teacher.path is not None else ""),
        got=f"{len(machines)} in the cluster, with {held}",
        wanted=f"{total['CPU']:g} CPUs and {total['GPU']:g} GPUs, each part whole on one machine",
        remedy="lower rollout.replicas, train.ranks or train.tensor_parallel, or the share of each "
        "(rollout.cpus_per_replica, train.cpus_per_rank, likewise gpus; fractions are allowed), or join a larger "
        "cluster",
    )


def engine_bundle(config: Config) -> dict[str, float]:
    return _bundle(config.rollout.cpus_per_replica, config.rollout.gpus_per_replica)


def other_bundles(config: Config) -> list[dict[str, float]]:
    """Resources of every learner process, then of the teacher."""
    train, teacher = config.train, config.teacher
    teachers = [_bundle(teacher.cpus, teacher.gpus)] if teacher.path is not None else []
    return [_bundle(train.cpus_per_rank, train.gpus_per_rank)] * train.processes + teachers


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Resources on one machine that are held for one actor.

    Attributes:
        node: Ray's id of the machine.
    """

    group: PlacementGroup
    index: int
    node: str

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=self.index)

    def free(self) -> None:
        """Give the resources of the whole group back; actors that are left in it die."""
        remove_placement_group(self.group)


async def reserve(config: Config) -> tuple[list[Place], list[Place]]:
    """Hold what a run starts with: places of the engines, as many as fit where their number is open; then those of the
    learner ranks and the teacher. Raises RlsysError where other work holds the resources."""
    engine, others, num = engine_bundle(config), other_bundles(config), config.rollout.num_replicas
    until = time.monotonic() + RESERVE_TIMEOUT_S
    while True:
        rooms = await asyncio.to_thread(free_rooms)
        engines = [engine] * (num or most_engines(engine, others, rooms))
        nodes = lay_out(engines + others, rooms) if engines else None
        if nodes is not None:
            break
        _check_in_time(until, [engine] * (num or 1) + others)
        await asyncio.sleep(RESERVE_PERIOD_S)
    run = config.run.name
    places = _ask_for(others, nodes[len(engines) :], f"rlsys-{run}")
    for number, node in enumerate(nodes[: len(engines)]):
        places += _ask_for([engine], [node], _name(run, engine_name(number)))
    for place in places:
        while not await asyncio.to_thread(place.group.wait, RESERVE_PERIOD_S):
            _check_in_time(until, engines + others)
    return places[len(others) :], places[: len(others)]


async def hold(bundle: Bundle, node: str, run: str, engine: str) -> Place:
    """Hold resources on a machine for one more engine. Raises EngineLost where they are not free."""
    (place,) = _ask_for([bundle], [node], _name(run, engine))
    try:
        if not await asyncio.to_thread(place.group.wait, HOLD_TIMEOUT_S):
            raise EngineLost(f"{dict(bundle)} were not free within {HOLD_TIMEOUT_S} s")
    except BaseException:
        place.free()
        raise
    return place


def free_rooms() -> dict[str, Bundle]:
    """What is free on every machine that is here to stay, by Ray's id of it."""
    leaving = state.get_draining_nodes()
    free = state.available_resources_per_node()
    return {
        str(node["NodeID"]): free.get(node["NodeID"], {})
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    }


def engine_name(number: int) -> str:
    """Of an engine of the start."""
    return f"rollout-{number}"


def _name(run: str, engine: str) -> str:
    """Ray takes each name of a placement group once."""
    return f"rlsys-{run}-{engine}"


def _ask_for(bundles: Sequence[Bundle], nodes: Sequence[str], name: str) -> list[Place]:
    """Placement group whose bundles are on given machines, once they are free there."""
    on_node = [{NODE_ID_LABEL_KEY: node} for node in nodes]
    group = placement_group([dict(bundle) for bundle in bundles], "PACK", name, bundle_label_selector=on_node)
    return [Place(group=group, index=index, node=node) for index, node in enumerate(nodes)]


def _check_in_time(until: float, asked: Sequence[Bundle]) -> None:
    if time.monotonic() < until:
        return
    free = ray.available_resources()
    raise RlsysError(
        f"the cluster had not {[dict(bundle) for bundle in asked]} free within {RESERVE_TIMEOUT_S} s; free in the "
        f"cluster: {free.get('CPU', 0.0):g} CPUs, {free.get('GPU', 0.0):g} GPUs. Other jobs hold the rest."
    )


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {kind: amount for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0} or {"CPU": ROUNDING}
