"""How far a step stands out from those before it."""

import pytest

from rlsys.train.spikes import MIN_SEEN, WINDOW, Spikes


def test_a_magnitude_is_measured_by_the_median_of_those_before_it():
    spikes = Spikes()
    assert [spikes.see(value) for value in (2.0, -4.0, 6.0, 8.0)] == pytest.approx([1.0, 2.0, 2.0, 2.0])
    assert spikes.see(50.0) == 10.0  # the median of 2, 4, 6, 8
    assert spikes.count == 0  # too few were seen


def test_what_stands_out_is_counted_and_becomes_usual_where_it_stays():
    spikes = Spikes()
    for _ in range(MIN_SEEN):
        spikes.see(1.0)
    assert (spikes.see(3.0), spikes.count) == (3.0, 0)
    assert (spikes.see(3.5), spikes.count) == (3.5, 1)
    for _ in range(WINDOW):
        spikes.see(10.0)
    assert spikes.see(10.0) == 1.0


def test_zeros_are_no_divisor():
    spikes = Spikes()
    assert [spikes.see(0.0), spikes.see(0.0), spikes.see(5.0)] == [1.0, 1.0, 1.0]


def test_a_restored_median_goes_on():
    first, second = Spikes(), Spikes()
    for value in range(1, 100):
        first.see(float(value % 7))
    second.restore(first.state())
    assert [first.see(90.0), first.count] == [second.see(90.0), second.count]
