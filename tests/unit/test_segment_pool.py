"""The segment pool never hands out what is being read, written, or the newest version."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlsys.weights.pool import SegmentPool


def test_newest_version_stays_until_a_newer_one_is_published():
    pool = SegmentPool(["a", "b"])
    assert pool.acquire() == "a"
    pool.publish("a")
    assert pool.acquire() == "b"
    assert pool.acquire() is None  # a is the newest, b is being written
    pool.add_reader("a")
    pool.publish("b")
    assert pool.newest == "b"
    assert pool.acquire() is None  # a is still being read
    pool.remove_reader("a")
    assert pool.acquire() == "a"


STEPS = st.lists(st.tuples(st.sampled_from(["acquire", "publish", "read", "leave"]), st.integers(0, 9)))


@given(steps=STEPS, num_segments=st.integers(2, 3))
def test_a_segment_being_read_is_never_handed_out(steps, num_segments):
    """Against an own account of who reads what: ``readers`` holds the segment of every read under way."""
    pool = SegmentPool([str(number) for number in range(num_segments)])
    readers: list[str] = []
    writing: list[str] = []
    newest = None
    for act, pick in steps:
        if act == "acquire":
            name = pool.acquire()
            busy = {*readers, *writing, newest}
            if name is None:
                assert busy >= {str(number) for number in range(num_segments)}
            else:
                assert name not in busy
                writing.append(name)
        elif act == "publish" and writing:
            newest = writing.pop(pick % len(writing))
            pool.publish(newest)
        elif act == "read" and newest is not None:
            pool.add_reader(newest)
            readers.append(newest)
        elif act == "leave" and readers:
            pool.remove_reader(readers.pop(pick % len(readers)))
        assert pool.newest == newest
