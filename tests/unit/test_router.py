"""The router: fresh enough, with room, least loaded; else the group is parked."""

from __future__ import annotations

from rlsys.rollout.router import EngineLoad, choose_engine


def _load(name: str, step: int | None, running: int, slots: int = 16) -> EngineLoad:
    return EngineLoad(name=name, step=step, running_rollouts=running, slots=slots)


def test_least_loaded_engine_wins_and_ties_go_by_name():
    assert choose_engine([_load("a", 3, 8), _load("b", 3, 4)], min_step=3, num_rollouts=4) == "b"
    assert choose_engine([_load("b", 3, 4), _load("a", 3, 4)], min_step=3, num_rollouts=4) == "a"
    assert choose_engine([_load("a", 3, 4, slots=8), _load("b", 3, 6, slots=24)], min_step=0, num_rollouts=2) == "b"


def test_an_engine_behind_or_without_weights_gets_nothing():
    assert choose_engine([_load("a", 2, 0), _load("b", 3, 12)], min_step=3, num_rollouts=4) == "b"
    assert choose_engine([_load("a", 2, 0), _load("b", None, 0)], min_step=3, num_rollouts=4) is None


def test_a_group_is_parked_until_it_fits_whole():
    assert choose_engine([_load("a", 3, 13)], min_step=0, num_rollouts=4) is None
    assert choose_engine([_load("a", 3, 12)], min_step=0, num_rollouts=4) == "a"
    assert choose_engine([], min_step=0, num_rollouts=1) is None
