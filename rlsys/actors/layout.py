"""Which machine holds what: plain functions of resources, by Ray's names for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Bundle = Mapping[str, float]  # resources of one engine, rank or teacher; or what a machine has of them

ROUNDING = 1e-3  # Ray counts resources in ten-thousandths


def how_many(bundle: Bundle, room: Bundle) -> int:
    """So many of ``bundle`` fit into ``room``.

    Example:
        >>> how_many({"CPU": 0.1}, {"CPU": 0.3, "GPU": 1.0})
        3
    """
    return max(0, math.floor(_times(bundle, room)))


def lay_out(bundles: Sequence[Bundle], rooms: Mapping[str, Bundle]) -> list[str] | None:
    """A machine for each bundle, on few machines: the largest bundle first, each on the first machine that has room,
    the roomiest one before the others.

    Args:
        rooms: by machine.

    Returns:
        Machines, in the order of the bundles; None where one of them finds no room.
    """
    order = sorted(range(len(bundles)), key=lambda index: -max(bundles[index].values()))
    left = {machine: dict(room) for machine, room in rooms.items()}
    roomiest = sorted(left, key=lambda machine: -_times(bundles[order[0]], left[machine]))
    chosen: dict[int, str] = {}
    for index in order:
        machine = next((machine for machine in roomiest if how_many(bundles[index], left[machine])), None)
        if machine is None:
            return None
        for kind, amount in bundles[index].items():
            left[machine][kind] -= amount
        chosen[index] = machine
    return [chosen[index] for index in range(len(bundles))]


def most_engines(engine: Bundle, others: Sequence[Bundle], rooms: Mapping[str, Bundle]) -> int:
    """How many engines the machines hold beside ``others``; 0 also where not even those fit."""
    most = sum(how_many(engine, room) for room in rooms.values())
    fitting = (num for num in range(most, 0, -1) if lay_out([engine] * num + [*others], rooms) is not None)
    return next(fitting, 0)


def _times(bundle: Bundle, room: Bundle) -> float:
    """``room`` is so many times ``bundle``, by what is scarcest."""
    return min((room.get(kind, 0.0) + ROUNDING) / amount for kind, amount in bundle.items())
