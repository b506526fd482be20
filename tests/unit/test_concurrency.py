"""Usable slots: fewer while the cache overflows, one more at a time afterwards, never none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlsys.controller.concurrency import is_overfull, usable_slots
from rlsys.rollout.router import EngineReport


def says(kv_share: float, waiting: int = 0, preempted: int = 0) -> EngineReport:
    return EngineReport(cache_block_tokens=16, num_waiting=waiting, kv_share=kv_share, num_preempted=preempted)


def test_a_full_cache_with_requests_waiting_is_overfull():
    assert is_overfull(says(0.96, waiting=1), None)
    assert not is_overfull(says(0.96), None)
    assert not is_overfull(says(0.95, waiting=9), None)


def test_requests_thrown_out_to_make_room_are_a_sign_and_those_thrown_out_by_a_swap_are_none():
    assert is_overfull(says(0.9, preempted=3), says(0.9, preempted=2))
    assert not is_overfull(says(0.9, preempted=3), says(0.9, preempted=3))
    assert not is_overfull(says(0.9, preempted=3), None)
    assert not is_overfull(says(0.1, waiting=8, preempted=9), says(0.9, preempted=1))  # the swap emptied the cache


def test_an_engine_without_statistics_is_never_overfull():
    silent = EngineReport(cache_block_tokens=16)
    assert not is_overfull(silent, silent)


def test_a_quarter_is_taken_off_and_one_slot_at_a_time_comes_back():
    assert usable_slots(16, slots=16, running=16, is_overfull=True) == 12
    assert usable_slots(12, slots=16, running=16, is_overfull=True) == 12  # the last shrinking does not show yet
    assert usable_slots(12, slots=16, running=12, is_overfull=True) == 9
    assert usable_slots(9, slots=16, running=9, is_overfull=False) == 10
    assert usable_slots(9, slots=16, running=3, is_overfull=False) == 9  # the slots are not what holds it back
    assert usable_slots(16, slots=16, running=16, is_overfull=False) == 16
    assert usable_slots(1, slots=16, running=1, is_overfull=True) == 1


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=40))
def test_whatever_an_engine_says_at_least_one_slot_is_left_and_never_more_than_it_has(slots, told):
    usable = slots
    for running, overfull in told:
        after = usable_slots(usable, slots=slots, running=running, is_overfull=overfull)
        assert 1 <= after <= slots
        assert after <= usable if overfull else usable <= after <= usable + 1
        if overfull and running <= usable > 1:
            assert after < usable
        usable = after
