import pytest

from rlsys.buffer.replay import BufferCounts
from rlsys.controller.ledger import Ledger, Stage
from rlsys.errors import LawBroken
from rlsys.records import DropCause


def test_a_group_is_accounted_for_from_submission_to_training():
    ledger = Ledger()
    ledger.submit("a", 4)
    for stage in (Stage.PARKED, Stage.RUNNING):
        ledger.move("a", stage, 4)
    ledger.drop("a", DropCause.REWARD_ERROR)
    ledger.move("a", Stage.BUFFERED, 3)
    assert ledger.lead == 3 and ledger.counts()[Stage.BUFFERED] == 3
    ledger.move("a", Stage.LEASED, 3)
    ledger.train("a", 3)
    ledger.check(BufferCounts(buffered=0, leased=0, trained=3, dropped=0), quiet=True)
    assert (ledger.submitted, ledger.trained, ledger.lead) == (4, 3, 0)
    assert ledger.dropped[DropCause.REWARD_ERROR] == 1


def test_a_group_that_arrives_with_other_members_than_it_left_with_is_a_broken_law():
    ledger = Ledger()
    ledger.submit("a", 4)
    with pytest.raises(LawBroken, match="arrived with 3"):
        ledger.move("a", Stage.RUNNING, 3)


def test_training_twice_or_without_a_lease_is_a_broken_law():
    ledger = Ledger()
    ledger.submit("a", 2)
    with pytest.raises(LawBroken, match="trained while queued"):
        ledger.train("a", 2)
    ledger.move("a", Stage.LEASED, 2)
    ledger.train("a", 2)
    with pytest.raises(LawBroken, match="not on the ledger"):
        ledger.train("a", 2)


def test_a_buffer_that_counts_otherwise_is_a_broken_law():
    ledger = Ledger()
    ledger.submit("a", 2)
    ledger.move("a", Stage.BUFFERED, 2)
    ledger.check(BufferCounts(buffered=0, leased=0, trained=0, dropped=0))  # still on its way
    with pytest.raises(LawBroken, match="the buffer counts"):
        ledger.check(BufferCounts(buffered=0, leased=0, trained=0, dropped=0), quiet=True)


def test_dropping_more_than_there_is_is_a_broken_law():
    ledger = Ledger()
    ledger.submit("a", 1)
    with pytest.raises(LawBroken, match="more rollouts than it had"):
        ledger.drop("a", DropCause.EMPTY, 2)
