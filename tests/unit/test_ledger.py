import pytest

from rlsys.buffer.replay import BufferCounts
from rlsys.controller.ledger import Ledger, Stage
from rlsys.controller.state import RunState
from rlsys.errors import LawBroken
from rlsys.prompts.source import SourceCounts
from rlsys.records import DropCause
from tests.builders import make_group, make_prompt

PROMPT = make_prompt()
GROUP = PROMPT.group_id


def test_a_group_is_accounted_for_from_submission_to_training():
    ledger = Ledger(RunState())
    ledger.submit(PROMPT, 4)
    for stage in (Stage.PARKED, Stage.RUNNING):
        ledger.move(GROUP, stage, 4)
    ledger.drop(GROUP, DropCause.REWARD_ERROR)
    ledger.move(GROUP, Stage.BUFFERED, 3)
    assert ledger.lead == 3 and ledger.counts()[Stage.BUFFERED] == 3
    ledger.move(GROUP, Stage.LEASED, 3)
    ledger.train(GROUP, 3)
    ledger.check(BufferCounts(buffered=0, leased=0, trained=3, dropped=0), quiet=True)
    assert (ledger.submitted, ledger.trained, ledger.lead) == (4, 3, 0)
    assert ledger.dropped[DropCause.REWARD_ERROR] == 1


def test_a_group_that_arrives_with_other_members_than_it_left_with_is_a_broken_law():
    ledger = Ledger(RunState())
    ledger.submit(PROMPT, 4)
    with pytest.raises(LawBroken, match="arrived with 3"):
        ledger.move(GROUP, Stage.RUNNING, 3)


def test_training_twice_or_without_a_lease_is_a_broken_law():
    ledger = Ledger(RunState())
    ledger.submit(PROMPT, 2)
    with pytest.raises(LawBroken, match="trained while queued"):
        ledger.train(GROUP, 2)
    ledger.move(GROUP, Stage.LEASED, 2)
    ledger.train(GROUP, 2)
    with pytest.raises(LawBroken, match="not on the ledger"):
        ledger.train(GROUP, 2)


def test_a_buffer_that_counts_otherwise_is_a_broken_law():
    ledger = Ledger(RunState())
    ledger.submit(PROMPT, 2)
    ledger.move(GROUP, Stage.BUFFERED, 2)
    ledger.check(BufferCounts(buffered=0, leased=0, trained=0, dropped=0))  # still on its way
    with pytest.raises(LawBroken, match="the buffer counts"):
        ledger.check(BufferCounts(buffered=0, leased=0, trained=0, dropped=0), quiet=True)


def test_dropping_more_than_there_is_is_a_broken_law():
    ledger = Ledger(RunState())
    ledger.submit(PROMPT, 1)
    with pytest.raises(LawBroken, match="more rollouts than it had"):
        ledger.drop(GROUP, DropCause.EMPTY, 2)


def test_a_draw_that_is_neither_trained_nor_on_its_way_nor_waiting_nor_given_up_is_a_broken_law():
    ledger = Ledger(RunState(groups_trained=3, given_up=1))
    ledger.submit(PROMPT, 2)
    ledger.check_draws(SourceCounts(drawn=7, waiting=2))  # 3 + 1 + 1 on its way + 2
    for drawn in (6, 8):
        with pytest.raises(LawBroken, match=f"{drawn} draws were handed out, 7 are accounted for"):
            ledger.check_draws(SourceCounts(drawn=drawn, waiting=2))


def test_a_filtered_draw_is_accounted_for_apart():
    ledger = Ledger(RunState(groups_trained=3, filtered=2))
    ledger.check_draws(SourceCounts(drawn=6, waiting=1))
    ledger.filtered += 1
    with pytest.raises(LawBroken, match="6 draws were handed out, 7 are accounted for.*filtered 3"):
        ledger.check_draws(SourceCounts(drawn=6, waiting=1))


def test_what_was_saved_stands_again_and_the_sums_go_on():
    groups = (make_group(1, [[0], [0]]), make_group(2, [[0], [0], [1]]))
    ledger = Ledger(RunState(groups=groups, trained=10, groups_trained=5, dropped={DropCause.EMPTY: 2}))
    assert (ledger.submitted, ledger.trained, ledger.lead) == (17, 10, 5)
    ledger.check(BufferCounts(buffered=5, leased=0, trained=10, dropped=0), quiet=True)


def test_only_groups_whose_record_agrees_with_the_ledger_are_saved_the_others_are_asked_again():
    whole, shrunk, gone = (make_group(index, [[0], [0], [0]]) for index in range(3))
    ledger = Ledger(RunState())
    for group in (whole, shrunk):
        ledger.submit(group.prompt, 3)
    ledger.drop(shrunk.group_id, DropCause.TOO_STALE)  # one member left the ledger, and not yet the record
    assert ledger.agreeing((whole, shrunk, gone)) == (whole,)
    assert ledger.unfinished((whole,)) == (shrunk.prompt,)
