"""Groups that were saved come back exactly."""

from __future__ import annotations

import io
import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from rlsys.buffer.saved import groups_from_arrays, groups_to_arrays
from rlsys.errors import CheckpointDamaged
from rlsys.records import Draw, DropCause, DroppedRollout, Prompt, Rollout, RolloutGroup, StopReason, TeacherScores
from tests.builders import make_group, make_unscored_group

NUMBERS = st.floats(allow_nan=False)  # infinities too: -inf is a log-probability
PARTS = st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2)
REWARDS = st.lists(NUMBERS, max_size=3).map(tuple)


def prompt_of(index: int, epoch: int, attempt: int) -> Prompt:
    draw = Draw(source="test", index=index, epoch=epoch)
    return Prompt(draw=draw, content=f"question {index}", answer=str(index), fields={"level": 3}, attempt=attempt)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    length = draw(st.integers(0, 6))

    def array(dtype: type, elements: st.SearchStrategy[Any] | None = None, *more: int) -> st.SearchStrategy[Any]:
        return stn.arrays(dtype, (length, *more), elements=elements)

    logprobs, num_candidates = st.floats(allow_nan=False, width=32), draw(st.integers(0, 2))
    teacher = st.builds(
        TeacherScores,
        logprobs_T=array(np.float32, logprobs),
        candidate_ids_TK=array(np.int32, None, num_candidates),
        candidate_logprobs_TK=array(np.float32, logprobs, num_candidates),
    )

    return Rollout(
        rollout_id=draw(st.text(max_size=5)),
        token_ids_T=draw(array(np.int32)),
        loss_mask_T=draw(array(np.bool_)),
        behaviour_logprobs_T=draw(array(np.float32, logprobs)),
        versions_T=draw(array(np.int64)),
        num_prompt_tokens=draw(st.integers(0, 9)),
        completion=draw(st.text(max_size=9)),
        stop_reason=draw(st.sampled_from(StopReason)),
        engine=draw(st.text(max_size=3)),
        seconds=draw(NUMBERS),
        reward=draw(st.none() | NUMBERS),
        reward_parts=draw(PARTS),
        turn_rewards=draw(st.none() | REWARDS),
        token_rewards=draw(st.none() | REWARDS),
        shaped_by=draw(NUMBERS),
        teacher=draw(st.none() | teacher),
    )


DROPPED = st.builds(DroppedRollout, rollout_id=st.text(), cause=st.sampled_from(DropCause), detail=st.text())
GROUPS = st.builds(
    RolloutGroup,
    prompt=st.builds(prompt_of, st.integers(0, 1 << 40), st.integers(0, 99), st.integers(0, 9)),
    rollouts=st.lists(rollouts(), max_size=3).map(tuple),
    dropped=st.lists(DROPPED, max_size=2).map(tuple),
    dropped_rewards=REWARDS,
    dropped_parts=st.lists(PARTS, max_size=2).map(tuple),
    greedy_reward=st.none() | NUMBERS,
)


def saved_and_read(groups) -> tuple[RolloutGroup, ...]:
    """Through the files that they are kept in: an npz without pickle, and JSON."""
    arrays, plain = groups_to_arrays(groups)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as read:
        return groups_from_arrays({name: read[name] for name in read}, json.loads(json.dumps(plain)), prompt_of)


def comparable(group: RolloutGroup) -> tuple[Any, ...]:
    """The group with bytes and types in place of arrays, which compare element by element."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.dtype, value.shape, value.tobytes()
        if isinstance(value, TeacherScores):
            return [plain(getattr(value, field.name)) for field in fields(value)]
        return (value, math.copysign(1.0, value)) if isinstance(value, float) else value

    members = [[plain(getattr(rollout, field.name)) for field in fields(rollout)] for rollout in group.rollouts]
    return replace(group, rollouts=()), members


@settings(max_examples=50)  # a case is large
@given(st.lists(GROUPS, max_size=3))
def test_groups_come_back_exactly(groups):
    assert [comparable(group) for group in saved_and_read(groups)] == [comparable(group) for group in groups]


def test_what_was_dropped_comes_back_with_its_cause_and_its_reward():
    group = make_group(4, [[1, 1], [2], [2, 3]], rewards=[0.1, 0.2, 0.3])
    lost = group.drop({"test:0:4#0/1": DropCause.TOO_STALE}, detail="step 2 \N{LESS-THAN OR EQUAL TO} 3")
    (read,) = saved_and_read([lost])
    assert read.dropped == lost.dropped and read.dropped_rewards == (0.2,)
    assert read.baseline_rewards == (0.1, 0.3, 0.2)
    assert read.rollouts[1].versions_T.tolist() == [-1, -1, 2, 3]
    assert read.prompt == prompt_of(4, 0, 0)  # as the source gives it


def test_a_group_that_was_not_scored_stays_so():
    (read,) = saved_and_read([make_unscored_group("3", "4\N{SNOWMAN}")])
    assert [rollout.reward for rollout in read.rollouts] == [None, None]
    assert read.rollouts[1].completion == "4\N{SNOWMAN}"


def test_the_number_of_arrays_does_not_grow_with_the_groups():
    few, _ = groups_to_arrays([])
    many, _ = groups_to_arrays([make_group(index, [[0], [0]]) for index in range(9)])
    assert few.keys() == many.keys() and {len(array) for array in few.values()} == {0}
    assert len(many["token_ids_T"]) == 9 * 2 * 3 and many["lengths_S"].tolist() == [3] * 18


def test_what_only_some_rollouts_have_comes_back_with_those_that_had_it():
    group = make_group(0, [[0], [0], [0]])
    plain, taught, rewarded = group.rollouts
    scores = TeacherScores(
        logprobs_T=np.array([0.0, -1.0, -2.0], dtype=np.float32),
        candidate_ids_TK=np.array([[1, 2], [3, 4], [5, 6]], dtype=np.int32),
        candidate_logprobs_TK=np.array([[0, -1], [-2, -3], [-4, -5]], dtype=np.float32),
    )
    members = (plain, replace(taught, teacher=scores, turn_rewards=(0.5,)), replace(rewarded, token_rewards=(0.1, 0.2)))
    (read,) = saved_and_read([replace(group, rollouts=members, greedy_reward=0.75)])
    assert [member.teacher is None for member in read.rollouts] == [True, False, True]
    assert read.rollouts[1].teacher.candidate_ids_TK.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert [member.turn_rewards for member in read.rollouts] == [None, (0.5,), None]
    assert [member.token_rewards for member in read.rollouts] == [None, None, (0.1, 0.2)]
    assert read.greedy_reward == 0.75


@pytest.mark.parametrize("name", ["token_ids_T", "versions_T", "lengths_S", "token_rewards"])
@pytest.mark.parametrize("change", [lambda array: array[:-1], lambda array: np.append(array, array[:1])])
def test_arrays_that_do_not_fit_are_refused(name, change):
    group = make_group(0, [[0], [0]])
    group = replace(group, rollouts=(replace(group.rollouts[0], token_rewards=(0.5,)), group.rollouts[1]))
    arrays, plain = groups_to_arrays([group])
    with pytest.raises(CheckpointDamaged, match="do not fit together"):
        groups_from_arrays({**arrays, name: change(arrays[name])}, plain, prompt_of)
