from dataclasses import replace

import pytest

from rlsys.buffer.replay import BufferCounts
from rlsys.controller.ledger import Ledger, Stage
from rlsys.controller.state import RunState
from rlsys.errors import LawBroken
from rlsys.prompts.source import SourceCounts
from rlsys.records import DropCause, RolloutGroup
from tests.builders import make_group, make_prompt

PROMPT = make_prompt()
WHOLE = make_group(0, [[0]] * 4)
IDS = [rollout.rollout_id for rollout in WHOLE.rollouts]


def submitted(num_rollouts: int = 4) -> tuple[Ledger, RolloutGroup]:
    ledger = Ledger(RunState())
    ledger.submit(PROMPT, IDS[:num_rollouts])
    return ledger, replace(WHOLE, rollouts=WHOLE.rollouts[:num_rollouts])


def test_a_group_is_accounted_for_from_submission_to_training():
    ledger, group = submitted()
    for stage in (Stage.PARKED, Stage.RUNNING, Stage.GATHERED):
        for rollout_id in IDS:
            ledger.move(rollout_id, stage)
            ledger.check()
    ledger.drop(IDS[3], DropCause.REWARD_ERROR)
    group = replace(group, rollouts=group.rollouts[:3])
    ledger.move_group(group, Stage.BUFFERED)
    assert ledger.lead == 3 and ledger.counts()[Stage.BUFFERED] == 3
    ledger.move_group(group, Stage.LEASED)
    ledger.train(group)
    ledger.check(BufferCounts(buffered=0, leased=0, trained=3, dropped=0), quiet=True)
    assert (ledger.submitted, ledger.trained, ledger.lead) == (4, 3, 0)
    assert ledger.dropped[DropCause.REWARD_ERROR] == 1


def test_members_of_one_group_stand_in_stages_of_their_own():
    ledger, _ = submitted()
    ledger.move(IDS[0], Stage.RUNNING)
    ledger.move(IDS[1], Stage.GATHERED)
    ledger.move(IDS[2], Stage.PARKED)
    counts = {stage: count for stage, count in ledger.counts().items() if count}
    assert counts == {Stage.QUEUED: 1, Stage.RUNNING: 1, Stage.GATHERED: 1, Stage.PARKED: 1}
    assert [ledger.stands(rollout_id) for rollout_id in (*IDS, f"{PROMPT.group_id}/9", "other/0")] == [True] * 4 + [
        False
    ] * 2
    ledger.check()


def test_a_group_that_arrives_with_other_members_than_it_left_with_is_a_broken_law():
    ledger, group = submitted()
    with pytest.raises(LawBroken, match="arrived with 3"):
        ledger.move_group(replace(group, rollouts=group.rollouts[:3]), Stage.SCORING)
    with pytest.raises(LawBroken, match="arrived with 4"):  # as many, and one of them twice
        ledger.move_group(replace(group, rollouts=group.rollouts[:3] + group.rollouts[:1]), Stage.SCORING)


def test_training_twice_or_without_a_lease_is_a_broken_law():
    ledger, group = submitted()
    ledger.move(IDS[1], Stage.LEASED)
    with pytest.raises(LawBroken, match="trained while queued"):
        ledger.train(group)
    ledger.move_group(group, Stage.LEASED)
    ledger.train(group)
    with pytest.raises(LawBroken, match="not on the ledger"):
        ledger.train(group)


def test_a_buffer_that_counts_otherwise_is_a_broken_law():
    ledger, group = submitted(2)
    ledger.move_group(group, Stage.BUFFERED)
    ledger.check(BufferCounts(buffered=0, leased=0, trained=0, dropped=0))  # still on its way
    with pytest.raises(LawBroken, match="the buffer counts"):
        ledger.check(BufferCounts(buffered=0, leased=0, trained=0, dropped=0), quiet=True)


def test_a_rollout_that_is_moved_or_dropped_after_it_left_is_a_broken_law():
    ledger, _ = submitted(2)
    ledger.drop(IDS[0], DropCause.EMPTY)
    for act in (lambda: ledger.drop(IDS[0], DropCause.EMPTY), lambda: ledger.move(IDS[0], Stage.RUNNING)):
        with pytest.raises(LawBroken, match="test:0:0#0/0 is not on the ledger"):
            act()
    assert (ledger.lead, ledger.num_groups) == (1, 1)
    ledger.drop(IDS[1], DropCause.EMPTY)
    assert (ledger.lead, ledger.num_groups) == (0, 0)


def test_a_draw_that_is_neither_trained_nor_on_its_way_nor_waiting_nor_given_up_is_a_broken_law():
    ledger = Ledger(RunState(groups_trained=3, given_up=1))
    ledger.submit(PROMPT, IDS[:2])
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
        ledger.submit(group.prompt, [rollout.rollout_id for rollout in group.rollouts])
    ledger.drop(
        shrunk.rollouts[0].rollout_id, DropCause.TOO_STALE
    )  # one member left the ledger, and not yet the record
    assert ledger.agreeing((whole, shrunk, gone)) == (whole,)
    assert ledger.unfinished((whole,)) == (shrunk.prompt,)
