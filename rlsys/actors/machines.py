"""The machines of the cluster, as places for rollout engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.actors.cluster import Place, first_sentence, free_rooms, hold
from rlsys.actors.layout import Bundle, how_many
from rlsys.actors.learner import RayLearner
from rlsys.actors.mirror import NodeMirror
from rlsys.actors.remote import answer
from rlsys.actors.rollout import RayFleet, Worker
from rlsys.actors.sender import Spot
from rlsys.controller.parts import Survey
from rlsys.errors import EngineLost, RlsysError
from rlsys.observe.sink import RunSink
from rlsys.weights.channel import NATIVE, NCCL, SHM, TCP, SharedMemory, channel_name
from rlsys.weights.tcp import Source


class RayMachines:
    """Starts engines where the cluster has room, and leads the weights to them.

    Args:
        home: Ray's id of the learner's machine.
        weight_channel: ``rollout.weight_channel``.
        bundle: resources of one engine.
        run: name of the run.
        new_engine: actor of an engine, by its name, at a place.
        new_mirror: actor of a mirror, at a machine.
    """

    def __init__(
        self,
        fleet: RayFleet,
        learner: RayLearner,
        sink: RunSink,
        *,
        home: str,
        weight_channel: str,
        bundle: Bundle,
        run: str,
        new_engine: Callable[[str, Place], Any],
        new_mirror: Callable[[NodeAffinitySchedulingStrategy], Any],
    ) -> None:
        self._fleet, self._learner, self._sink = fleet, learner, sink
        self._home, self._weight_channel, self._bundle, self._run = home, weight_channel, bundle, run
        self._new_engine, self._new_mirror = new_engine, new_mirror
        self._opening = asyncio.Lock()
        self._source: Source | None = None
        self._spot: Spot | None = None  # of senders on the learner's machine

    def engines(self) -> Mapping[str, str]:
        names = _names()
        return {engine: names[node] for engine, node in self._fleet.nodes().items()}

    async def survey(self) -> Survey:
        """Raises RlsysError where the cluster does not answer."""
        try:
            rooms, names = await asyncio.to_thread(lambda: (free_rooms(), _names()))
        except RayError as error:
            raise RlsysError(f"the cluster does not answer: {first_sentence(error)}") from error
        return Survey(
            room={
                names[node]: how_many(self._bundle, room)
                for node, room in rooms.items()
                if self._weight_channel != SHM or node == self._home
            },
            leaving=frozenset(engine for engine, node in self._fleet.nodes().items() if node not in rooms),
        )

    async def start(self, engine: str, machine: str) -> None:
        nodes = {name: node for node, name in (await asyncio.to_thread(_names)).items()}
        if machine not in nodes:
            raise EngineLost(f"{machine} is gone")
        place = await hold(self._bundle, nodes[machine], self._run, engine)
        try:
            await self.admit(engine, await self.wake(engine, place), place)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(place.free))
            raise

    async def wake(self, engine: str, place: Place) -> Any:
        """Actor of an engine that is up. Raises EngineLost."""
        actor = self._new_engine(engine, place)
        await answer(actor.start.remote(), engine, EngineLost)
        return actor

    async def admit(self, engine: str, actor: Any, place: Place) -> None:
        """Make an engine known to the fleet that is up. The learner must be up, too. Raises EngineLost."""
        is_home = place.node == self._home
        async with self._opening:  # one channel for all engines of a machine
            channel = self._fleet.channel_at(place.node)
            if channel is None:
                by_tcp = channel_name(self._weight_channel, is_home=is_home) == TCP
                channel = await self._mirror_at(place.node) if by_tcp else SharedMemory()
            if self._weight_channel == NCCL and self._spot is None:
                self._spot = await self._learner.spot()
        if self._weight_channel in NATIVE:
            await answer(actor.open_sender.remote(self._spot), engine, EngineLost)
        if isinstance(channel, NodeMirror):
            where = "on the learner's machine" if is_home else "on another machine than the learner"
            self._sink.event(f"{engine}: {where}; weights go there over TCP")
        self._fleet.admit(engine, Worker(actor=actor, place=place, channel=channel))

    async def _mirror_at(self, node: str) -> NodeMirror:
        self._source = self._source or await self._learner.serve_segments()
        name = f"weight mirror on {node[:8]}"
        actor = self._new_mirror(NodeAffinitySchedulingStrategy(node_id=node, soft=False))
        paths = await answer(actor.segments.remote(self._run), name, EngineLost)
        return NodeMirror(name, actor, paths, self._source)


def _names() -> dict[str, str]:
    """What a person calls each machine, by Ray's id."""
    return {str(node["NodeID"]): f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" for node in ray.nodes()}
