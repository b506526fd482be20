"""Every row of ADVANTAGES against values worked out by hand."""

import inspect
import math
from functools import partial

import pytest
import torch

from rlsys.algo import ADVANTAGES
from rlsys.algo.advantages import grpo, rewards_on_tokens
from rlsys.algo.rows import call_whole
from rlsys.algo.segments import Segments
from tests.unit.test_algo import doubles, flags, floats

ROOT = math.sqrt(0.5)

# Two groups. Means 1 and 2; differences -1, 0, 1 and -2, 2; unbiased stds sqrt(2 / 2) = 1 and sqrt(8 / 1).
GROUPS = {
    "rewards_S": doubles(0, 1, 2, 0, 4),
    "group_starts_G": torch.tensor([0, 3]),
    "lengths_S": doubles(2, 0, 1, 1, 1),
    "reward_parts_SK": torch.stack([doubles(0, 1, 2, 0, 4), doubles(1, 1, 1, 1, 0)], dim=1),
}
# Two sequences: prompt, action, environment, action; action, action. The reward of 9 stands on the prompt: nobody's.
# The first action earns its own 1 and the environment's 2.
TOKENS = {
    "rewards_T": doubles(9, 1, 2, 3, 4, 5),
    "values_T": doubles(math.nan, 1, math.nan, 2, 3, 4),
    "mask_T": flags(0, 1, 0, 1, 1, 1),
    "segments": Segments(torch.tensor([0, 4]), 6),
    "greedy_rewards_S": doubles(1, 2),
}
# One group of two rollouts of two turns.
TURNS = {
    "rewards_S": doubles(0, 1),
    "turn_rewards_U": doubles(1, 0, 0, 2),
    "turn_keys_U": torch.tensor([0, 1, 0, 1]),
    "turn_states_U": torch.tensor([7, 9, 7, 9]),
    "turn_rollouts_U": torch.tensor([0, 0, 1, 1]),
    "group_starts_G": torch.tensor([0]),
}

GOLDEN = [
    ("grpo", {"eps": 0.0}, GROUPS, [-1, 0, 1, -ROOT, ROOT]),
    ("grpo", {"eps": 1.0}, GROUPS, [-1 / 2, 0, 1 / 2, -2 / (1 + 8**0.5), 2 / (1 + 8**0.5)]),
    ("grpo", {"scale_by_std": False}, GROUPS, [-1, 0, 1, -2, 2]),
    # divided by n: stds sqrt(2 / 3) and sqrt(8 / 2)
    ("grpo", {"eps": 0.0, "unbiased": False}, GROUPS, [-(1.5**0.5), 0, 1.5**0.5, -1, 1]),
    ("dr_grpo", {}, GROUPS, [-1, 0, 1, -2, 2]),
    # the others' means: 1.5, 1, 0.5 and 4, 0
    ("rloo", {}, GROUPS, [-1.5, 0, 1.5, -4, 4]),
    ("grpo_loo", {"eps": 1.0}, GROUPS, [-1.5 / 2, 0, 1.5 / 2, -4 / (1 + 8**0.5), 4 / (1 + 8**0.5)]),
    ("maxrl", {"eps": 1.0}, GROUPS, [-1 / 2, 0, 1 / 2, -2 / 3, 2 / 3]),
    ("grpo_passk", {"scale_by_std": False}, GROUPS, [0, 0, 2 - 1, 0, 4 - 0]),
    ("grpo_passk", {"eps": 0.0}, GROUPS, [0, 0, 1 / 1, 0, 4 / 8**0.5]),
    # baselines (2 * 0 + 1 * 2) / 3 and (0 + 4) / 2
    ("opo", {}, GROUPS, [-2 / 3, 1 / 3, 4 / 3, -2, 2]),
    # all rewards: sum 7, squares 21, variance (21 - 49 / 5) / 4 = 2.8
    ("lite_ppo", {"eps": 0.0}, GROUPS, [x / 2.8**0.5 for x in (-1, 0, 1, -2, 2)]),
    # alpha = 5 / 3
    ("gpg", {"f_norm": 2.0}, GROUPS, [x * 5 / 6 for x in (-1, 0, 1, -2, 2)]),
    # by lengths: 5 tokens, sum -2 + 1 - 2 + 2 = -1, squares 2 + 1 + 4 + 4 = 11, variance (11 - 1 / 5) / 4 = 2.7
    ("reinforce_pp_baseline", {}, GROUPS, [(x + 0.2) / 2.7**0.5 for x in (-1, 0, 1, -2, 2)]),
    # parts -1, 0, 1, -ROOT, ROOT and twice 0, 0, 0, ROOT, -ROOT: -1, 0, 1, ROOT, -ROOT.
    # By lengths: sum -2 + 1 = -1, squares 2 + 1 + 0.5 + 0.5 = 4, variance (4 - 1 / 5) / 4 = 0.95
    ("gdpo", {"weights": (1.0, 2.0), "eps": 0.0}, GROUPS, [(x + 0.2) / 0.95**0.5 for x in (-1, 0, 1, ROOT, -ROOT)]),
    # returns 3 + 3 / 2, 3, 4 + 5 / 2, 5: mean 4.75, squares of -0.25, -1.75, 1.75, 0.25 are 6.25, over 3
    (
        "reinforce_pp",
        {"gamma": 0.5},
        TOKENS,
        [
            0,
            -0.25 / (6.25 / 3) ** 0.5,
            0,
            -1.75 / (6.25 / 3) ** 0.5,
            1.75 / (6.25 / 3) ** 0.5,
            0.25 / (6.25 / 3) ** 0.5,
        ],
    ),
    # returns 6, 3 less 1; 9, 5 less 2
    ("remax", {}, TOKENS, [0, 5, 0, 2, 7, 3]),
    # errors 3 + 2 / 2 - 1 = 3, 3 - 2 = 1; 4 + 4 / 2 - 3 = 3, 5 - 4 = 1; then 3 + 1 / 4, 1, twice
    ("gae", {"gamma": 0.5, "lam": 0.5, "whitened": False}, TOKENS, [0, 3.25, 0, 1, 3.25, 1]),
    # mean 2.125, all 1.125 away, variance 4 * 1.125^2 / 3
    ("gae", {"gamma": 0.5, "lam": 0.5}, TOKENS, [0, 0.75**0.5, 0, -(0.75**0.5), 0.75**0.5, -(0.75**0.5)]),
    # returns 1, 0 and 2, 2: turn 0 has 1 and 2, turn 1 has 0 and 2
    ("turn_grpo", {"scale_by_std": False}, TURNS, [-0.5, -1, 0.5, 1]),
    ("turn_grpo", {"eps": 0.0}, TURNS, [-ROOT, -ROOT, ROOT, ROOT]),
    # returns 1, 0 and 1, 2: turn 0 has no difference
    ("turn_grpo", {"gamma": 0.5, "scale_by_std": False}, TURNS, [0, -1, 0, 1]),
    # rollouts -0.5, 0.5, and twice the turns
    ("gigpo", {"gamma": 1.0, "step_weight": 2.0, "scale_by_std": False}, TURNS, [-1.5, -2.5, 1.5, 2.5]),
]


@pytest.mark.parametrize(("name", "parameters", "inputs", "wanted"), GOLDEN)
def test_advantages_are_those_worked_out_by_hand(name, parameters, inputs, wanted):
    result = call_whole(partial(ADVANTAGES[name], **parameters), inputs)
    got = getattr(result, "advantages_T", result)
    torch.testing.assert_close(got, doubles(*wanted), rtol=0, atol=1e-7)


def test_every_row_has_a_golden_value():
    assert {case[0] for case in GOLDEN} == ADVANTAGES.keys()


PER_ROLLOUT = [name for name, _, inputs, _ in GOLDEN if inputs is GROUPS]


@pytest.mark.parametrize("name", sorted(set(PER_ROLLOUT) - {"reinforce_pp_baseline", "gdpo"}))
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_group_without_variance_or_with_one_member_gets_exactly_zero(name, eps):
    # 0.1 three times does not average to 0.1 in binary, and 1 / eps would blow the rest up
    has_eps = "eps" in inspect.signature(ADVANTAGES[name]).parameters
    bound = partial(ADVANTAGES[name], eps=eps) if has_eps else ADVANTAGES[name]
    inputs = {
        "rewards_S": floats(0.1, 0.1, 0.1, 7.0, 1.0, 0.0),
        "group_starts_G": torch.tensor([0, 3, 4]),
        "lengths_S": floats(1, 2, 3, 4, 5, 6),
    }
    advantages = call_whole(bound, inputs)
    assert advantages.dtype == torch.float32
    assert advantages[:4].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert advantages[4] > 0 >= advantages[5]


def test_a_batch_without_any_difference_is_not_blown_up():
    inputs = {**GROUPS, "rewards_S": doubles(1, 1, 1, 0, 0), "reward_parts_SK": torch.ones(5, 2).double()}
    for name in ("lite_ppo", "gpg", "reinforce_pp_baseline", "gdpo"):
        assert call_whole(ADVANTAGES[name], inputs).tolist() == [0, 0, 0, 0, 0]


def test_grpo_equals_a_loop_over_many_groups():
    torch.manual_seed(0)
    sizes = torch.randint(2, 9, (50,))
    rewards = torch.rand(int(sizes.sum()), dtype=torch.float64)
    wanted = torch.cat([(part - part.mean()) / (part.std() + 1e-6) for part in rewards.split(sizes.tolist())])
    torch.testing.assert_close(grpo(rewards, sizes.cumsum(0) - sizes), wanted)


def test_group_starts_that_do_not_begin_at_zero_or_do_not_ascend_are_refused():
    for starts in ([1, 2], [0, 2, 2], [0, 9]):
        with pytest.raises(AssertionError):
            grpo(floats(1, 2, 3), torch.tensor(starts))


def test_no_rewards_give_no_advantages():
    assert grpo(floats(), torch.tensor([], dtype=torch.int64)).tolist() == []


def test_two_that_share_the_best_reward_leave_nothing_to_learn_of_pass_at_k():
    assert ADVANTAGES["grpo_passk"](floats(1, 3, 3), torch.tensor([0])).tolist() == [0, 0, 0]


def test_a_rollout_that_is_in_the_baseline_only_moves_neither_length_nor_whitening():
    rewards, lengths = doubles(0, 4, 100), doubles(1, 1, 0)
    inputs = {"rewards_S": rewards, "group_starts_G": torch.tensor([0]), "lengths_S": lengths}
    assert call_whole(ADVANTAGES["opo"], inputs)[:2].tolist() == [-2, 2]
    # differences from the mean of all three, whitened over the two that have tokens: +-2 around their mean, std sqrt(8)
    whitened = call_whole(ADVANTAGES["reinforce_pp_baseline"], inputs)
    torch.testing.assert_close(whitened[:2], doubles(-ROOT, ROOT), rtol=0, atol=1e-7)


def test_gae_returns_are_advantage_plus_value_before_whitening():
    inputs = {**TOKENS, "values_T": doubles(9, 1, 9, 2, 3, 4)}
    for whitened in (True, False):
        result = call_whole(partial(ADVANTAGES["gae"], gamma=0.5, lam=0.5, whitened=whitened), inputs)
        assert result.returns_T.tolist() == [0, 4.25, 0, 3, 6.25, 5]


def test_gae_at_lambda_one_is_the_return_less_the_value_and_at_zero_the_error_alone():
    for lam, wanted in ((1.0, [0, 3 + 3 - 1, 0, 3 - 2, 4 + 5 - 3, 5 - 4]), (0.0, [0, 3 + 2 - 1, 0, 1, 4 + 4 - 3, 1])):
        result = call_whole(partial(ADVANTAGES["gae"], lam=lam, whitened=False), TOKENS)
        assert result.advantages_T.tolist() == wanted


def test_a_reward_on_a_prompt_is_nobodys_and_not_of_the_sequence_before():
    inputs = {
        "rewards_T": doubles(1, 7, 2, 7, 7),
        "mask_T": flags(1, 0, 1, 0, 0),
        "segments": Segments(torch.tensor([0, 1, 3]), 5),
        "greedy_rewards_S": doubles(0, 0, 0),
    }
    assert call_whole(ADVANTAGES["remax"], inputs).returns_T.tolist() == [1, 0, 2, 0, 0]


def test_a_rollouts_reward_lands_on_its_last_weighted_token():
    segments, mask = Segments(torch.tensor([0, 3, 5]), 6), flags(1, 1, 0, 0, 0, 1)
    assert rewards_on_tokens(floats(2, 3, 4), mask, segments).tolist() == [0, 2, 0, 0, 0, 4]


def test_turns_are_compared_within_their_group_whatever_their_keys():
    inputs = {
        "turn_rewards_U": doubles(0, 4, 1, 9),
        "turn_keys_U": torch.tensor([5, 5, 5, -3]),
        "turn_rollouts_U": torch.tensor([0, 1, 2, 3]),
        "group_starts_G": torch.tensor([0, 2]),
    }
    # the third and fourth are one group, but have no like turn in it
    assert call_whole(partial(ADVANTAGES["turn_grpo"], scale_by_std=False), inputs).tolist() == [-2, 2, 0, 0]
