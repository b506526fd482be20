"""SELECTIONS by hand, and how the controller shapes and selects a group."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.selection import SELECTIONS, Selection, mean_between, overlong, roc, zero_variance
from rlsys.algo.shaping import SHAPINGS
from rlsys.controller.select import Selector, score_of
from rlsys.records import DropCause, RolloutGroup, StopReason
from rlsys.rollout.play import greedy_id
from tests.builders import make_group, make_rollout


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flags(text: str) -> torch.Tensor:
    return torch.tensor([character == "x" for character in text])


def selected(selection: Selection) -> tuple[str, ...]:
    return tuple("".join("x" if kept else "." for kept in mask) for mask in (selection.keep_S, selection.baseline_S))


def test_a_group_whose_scores_are_all_equal_leaves():
    selection = zero_variance(doubles(1, 1, 0, 1, 0.5, 0), torch.tensor([0, 2, 4, 5]))
    assert selected(selection) == ("..xx..", "xxxxxx")  # groups 1 1, 0 1, 0.5 and 0


def test_a_group_stays_where_its_mean_score_lies_strictly_between():
    scores = doubles(0, 0, 1, 0, 1, 1, 0.5, 0.25)
    selection = mean_between(scores, torch.tensor([0, 2, 4, 6]))  # means 0, 0.5, 1, 0.375
    assert selected(selection)[0] == "..xx..xx"
    selection = mean_between(scores, torch.tensor([0, 2, 4, 6]), low=0.375, high=2.0)
    assert selected(selection)[0] == "..xxxx.."


def test_what_was_cut_leaves_and_its_reward_stays():
    assert selected(overlong(flags(".x.x"))) == ("x.x.", "xxxx")


def test_half_of_an_oversampled_group_is_kept_the_cleanest_successes_and_any_failures():
    right = flags("xxxx....")
    penalties = doubles(0.3, 0.0, -0.1, 0.2, 0.9, 0.0, 0.0, 0.5)
    draws = doubles(0.1, 0.2, 0.3, 0.4, 0.8, 0.3, 0.7, 0.6)
    # two of the four right ones, of penalty 0.0 and 0.1; two of the four wrong ones, of draws 0.3 and 0.6
    selection = roc(right, penalties, draws, torch.tensor([0]), keep=4)
    assert selected(selection) == (".xx..x.x", ".xx..x.x")


def test_successes_of_equal_penalty_are_drawn():
    selection = roc(flags("xxxx"), doubles(0, 0, 0, 0), doubles(0.5, 0.1, 0.9, 0.2), torch.tensor([0]), keep=2)
    assert selected(selection)[0] == ".x.x"


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ("x.......", "x.x."),  # 1 * 4 / 8 is a half: the wrong ones take 4 - 0.5, rounded up to 4, less the right one
        ("xxxxxxx.", "x.x."),
        ("xxx", "xxx"),  # too few to choose among
        ("x..x", "x..x"),
    ],
)
def test_neither_kind_is_lost_and_a_small_group_stays(kinds, wanted):
    nothing = torch.zeros(len(kinds), dtype=torch.float64)
    selection = roc(flags(kinds), nothing, nothing, torch.tensor([0]), keep=4)
    kept = "".join(kind for kind, is_kept in zip(kinds, selection.keep_S.tolist(), strict=True) if is_kept)
    if len(kinds) <= 4:
        assert kept == wanted
    else:
        assert len(kept) == 4 and set(kept) == {"x", "."}


MEMBER = st.tuples(st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 0.999), st.booleans())


@settings(max_examples=25)
@given(st.lists(st.lists(MEMBER, min_size=1, max_size=9), min_size=1, max_size=4), st.integers(2, 6))
def test_a_group_is_selected_alone_as_among_others_and_in_the_promised_proportion(groups, keep):
    def inputs(groups):
        members = [member for group in groups for member in group]
        sizes = torch.tensor([len(group) for group in groups])
        right, penalties, draws, cut = zip(*members, strict=True)
        scores = doubles(*map(float, right))
        return {
            "right": torch.tensor(right), "penalties": doubles(*penalties), "draws": doubles(*draws),
            "cut": torch.tensor(cut), "scores": scores, "starts": sizes.cumsum(0) - sizes,
        }  # fmt: skip

    rows = {
        "zero_variance": lambda i: zero_variance(i["scores"], i["starts"]),
        "mean_between": lambda i: mean_between(i["scores"], i["starts"], high=0.8),
        "overlong": lambda i: overlong(i["cut"]),
        "roc": lambda i: roc(i["right"], i["penalties"], i["draws"], i["starts"], keep=keep),
    }
    assert set(rows) == set(SELECTIONS)
    for name, row in rows.items():
        together = row(inputs(groups))
        alone = [row(inputs([group])) for group in groups]
        assert together.keep_S.tolist() == [kept for one in alone for kept in one.keep_S.tolist()], name
        if name == "roc":
            for group, one in zip(groups, alone, strict=True):
                num_kept, num_right = int(one.keep_S.sum()), sum(right for right, _, _, _ in group)
                right_kept = sum(k and member[0] for k, member in zip(one.keep_S.tolist(), group, strict=True))
                assert num_kept == min(keep, len(group))
                assert abs(right_kept - num_right * num_kept / len(group)) <= 1


def test_a_parameter_out_of_range_is_refused():
    with pytest.raises(AssertionError):
        roc(flags("x."), doubles(0, 0), doubles(0, 0), torch.tensor([0]), keep=1)
    with pytest.raises(AssertionError):
        mean_between(doubles(0.0), torch.tensor([0]), low=1.0, high=1.0)


# --- the controller's part -----------------------------------------------------------------------------------------


def selector(*, shaping=(), selection=(), seed=0) -> Selector:
    return Selector(shaping=shaping, selection=selection, correct_at=1.0, max_tokens=4, seed=seed)


def causes(group: RolloutGroup) -> dict[str, tuple[DropCause, str]]:
    return {member.rollout_id.rpartition("/")[2]: (member.cause, member.detail) for member in group.dropped}


def test_without_rows_a_group_passes_as_it_is():
    group = make_group(0, [[0], [0]])
    assert selector()(group) is group


def test_the_reward_is_shaped_and_says_by_how_much():
    group = make_group(0, [[0] * 4, [0]], rewards=[1.0, 0.5])  # 4 and 1 sampled tokens of at most 4
    overlong_penalty = partial(SHAPINGS["overlong_penalty"], buffer=2, factor=0.25)
    once = selector(shaping=(overlong_penalty,))(group)
    assert [rollout.reward for rollout in once.rollouts] == [0.75, 0.5]
    assert [rollout.shaped_by for rollout in once.rollouts] == [-0.25, 0.0]
    twice = selector(shaping=(overlong_penalty, overlong_penalty))(group)
    assert [rollout.reward for rollout in twice.rollouts] == [0.5, 0.5]
    assert [score_of(rollout) for rollout in twice.rollouts] == [1.0, 0.5]


def test_repetitions_are_looked_for_in_what_was_sampled():
    group = make_group(0, [[0] * 4, [0] * 4], rewards=[1.0, 1.0])  # two tokens of the prompt, four sampled ones
    first, second = group.rollouts
    ids = np.array([7, 7, 1, 2, 1, 2], dtype=np.int32)
    group = replace(group, rollouts=(first, replace(second, token_ids_T=ids)))
    left = selector(shaping=(partial(SHAPINGS["repetition_penalty"], n=2),))(group)
    assert [rollout.reward for rollout in left.rollouts] == pytest.approx([1.0, 1 - 1 / 3])  # 12 21 12


def test_scores_are_compared_and_not_what_lengths_made_of_them():
    group = make_group(0, [[0] * 4, [0]], rewards=[1.0, 1.0])
    overlong_penalty = partial(SHAPINGS["overlong_penalty"], buffer=2)
    left = selector(shaping=(overlong_penalty,), selection=[("zero_variance", zero_variance)])(group)
    assert left.rollouts == ()
    assert causes(left) == {name: (DropCause.FILTERED, "zero_variance") for name in "01"}


def test_the_reward_of_what_was_cut_stays_in_the_baseline_and_that_of_the_surplus_leaves_it():
    group = make_group(0, [[0]] * 6, rewards=[1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    cut = replace(group.rollouts[0], stop_reason=StopReason.LENGTH)
    group = replace(group, rollouts=(cut, *group.rollouts[1:]))
    left = selector(selection=[("overlong", overlong), ("roc", partial(roc, keep=2))])(group)
    # the cut one first, its reward kept; of the five others one right and one wrong one
    assert sorted(rollout.reward for rollout in left.rollouts) == [0.0, 1.0]
    assert left.dropped_rewards == (1.0,) and len(left.dropped_parts) == 1
    assert sorted(left.baseline_rewards) == [0.0, 1.0, 1.0]
    assert [detail for _, detail in causes(left).values()] == ["overlong", "roc", "roc", "roc"]


def test_the_part_named_penalty_says_which_success_is_cleanest():
    group = make_group(0, [[0]] * 4, rewards=[1.0] * 4)
    penalties = (-0.5, -0.1, -0.3, -0.2)
    rollouts = zip(group.rollouts, penalties, strict=True)
    group = replace(group, rollouts=tuple(replace(one, reward_parts={"penalty": p}) for one, p in rollouts))
    left = selector(selection=[("roc", partial(roc, keep=2))])(group)
    assert [rollout.rollout_id[-1] for rollout in left.rollouts] == ["1", "3"]


def test_random_choices_are_the_same_in_every_process_and_differ_by_group_and_seed():
    def kept(index, seed=0):
        left = selector(selection=[("roc", partial(roc, keep=2))], seed=seed)(make_group(index, [[0]] * 8, [0.0] * 8))
        return "".join(rollout.rollout_id[-1] for rollout in left.rollouts)

    assert kept(0) == kept(0) == "56"
    assert len({kept(index) for index in range(12)}) > 6 and len({kept(0, seed) for seed in range(12)}) > 6


def test_the_greedy_rollout_is_shaped_as_the_others_and_only_its_reward_is_left():
    group = make_group(0, [[0], [0] * 4])
    greedy = make_rollout(greedy_id(group.group_id), [0] * 4, reward=1.0)
    overlong_penalty = partial(SHAPINGS["overlong_penalty"], buffer=2, factor=0.25)
    # both others score the same: the greedy one is not compared with them
    scored = replace(group, rollouts=(*(replace(one, reward=0.0) for one in group.rollouts), greedy))
    left = selector(shaping=(overlong_penalty,))(scored)
    assert left.greedy_reward == 0.75 and causes(left) == {"greedy": (DropCause.BASELINE, "")}
    assert left.baseline_rewards == (0.0, -0.25)
    assert selector(selection=[("zero_variance", zero_variance)])(scored).rollouts == ()
