"""Which machine holds what, by hand and over random clusters."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.actors.layout import how_many, lay_out, most_engines

ENGINE, RANK = {"CPU": 2.0}, {"CPU": 1.0}


def cpus(**machines: float) -> dict[str, dict[str, float]]:
    return {name: {"CPU": amount, "memory": 1e9} for name, amount in machines.items()}


@pytest.mark.parametrize(
    ("bundle", "room", "number"),
    [
        ({"CPU": 0.1}, {"CPU": 0.3}, 3),  # 0.3 / 0.1 is 2.9999999999999996
        ({"CPU": 2.0}, {"CPU": 1.9999}, 1),  # Ray's own rounding
        ({"CPU": 2.0}, {"CPU": 1.9}, 0),
        ({"CPU": 1.0, "GPU": 0.5}, {"CPU": 64.0, "GPU": 1.0}, 2),
        ({"GPU": 1.0}, {"CPU": 64.0}, 0),
        ({"CPU": 1.0}, {"CPU": -0.5}, 0),
    ],
)
def test_a_machine_holds_as_many_as_its_scarcest_resource_allows(bundle, room, number):
    assert how_many(bundle, room) == number


def test_the_largest_are_placed_first_and_the_roomiest_machine_is_filled_first():
    assert lay_out([ENGINE, RANK, RANK], cpus(small=2.0, large=3.0)) == ["large", "large", "small"]
    # were the ranks placed before the engine, one on each machine, it would find no room
    assert lay_out([RANK, RANK, ENGINE], cpus(a=2.0, b=2.0)) == ["b", "b", "a"]
    assert lay_out([ENGINE, RANK], {}) is None
    assert lay_out([RANK, RANK, ENGINE], cpus(a=2.0, b=1.0)) is None


def test_engines_get_what_the_others_leave():
    assert most_engines(ENGINE, [RANK], cpus(a=8.0)) == 3
    assert most_engines(ENGINE, [RANK, RANK], cpus(a=2.0, b=2.0)) == 1
    assert most_engines(ENGINE, [RANK], cpus(a=2.0)) == 0  # there is room for an engine, or for the rank
    assert most_engines(ENGINE, [{"GPU": 1.0}], cpus(a=8.0)) == 0


AMOUNTS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])
BUNDLES = st.fixed_dictionaries({"CPU": AMOUNTS}, optional={"GPU": AMOUNTS})
ROOMS = st.dictionaries(st.sampled_from("abcd"), BUNDLES, max_size=4)


@given(BUNDLES, st.lists(BUNDLES, min_size=1, max_size=4), ROOMS)
def test_no_machine_holds_more_than_it_has(engine, others, rooms):
    num = most_engines(engine, others, rooms)
    machines = lay_out([engine] * num + others, rooms)
    if machines is None:
        assert num == 0
        return
    held: dict[str, Counter[str]] = {machine: Counter() for machine in rooms}
    for bundle, machine in zip([engine] * num + others, machines, strict=True):
        held[machine].update(bundle)  # type: ignore[arg-type]
    assert all(
        amount <= rooms[machine].get(kind, 0.0) + 0.01 for machine in rooms for kind, amount in held[machine].items()
    )
