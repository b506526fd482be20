"""Every row of POLICY_LOSSES, VALUE_LOSSES and KL_ESTIMATORS against values worked out by hand."""

import functools
import math
from typing import Any

import pytest
import torch

from rlsys.algo import KL_ESTIMATORS, POLICY_LOSSES, VALUE_LOSSES
from rlsys.algo.kl import penalised_rewards
from rlsys.algo.losses import ppo_clip
from rlsys.algo.rows import call_row, call_whole, facts_of
from rlsys.algo.segments import Segments
from tests.unit.test_algo import doubles, flags, floats, values_of

# Three sequences of two, two and one token, and a token of padding behind them with garbage on it.
# policy / anchor = 1.5, 0.5 | 1.5, 0.5 | 1.1; their logs are 0.405465, -0.693147 and 0.095310
# log(policy) = -1.203973, -1.609438 | -1.203973, -1.609438 | -0.597837
NAN = math.nan
INPUTS: dict[str, Any] = {
    "policy_logprobs_T": doubles(0.3, 0.2, 0.3, 0.2, 0.55, NAN).log(),
    "anchor_logprobs_T": doubles(0.2, 0.4, 0.2, 0.4, 0.5, 0.0).log(),
    "advantages_T": doubles(1, 1, -1, -1, 2, NAN),
    "mask_T": flags(1, 1, 1, 1, 1, 0),
    "segments": Segments(torch.tensor([0, 2, 4]), 6),
    "correct_T": flags(1, 1, 0, 0, 0, 1),
    "token_draws_T": doubles(0.0, 0.9, 0.5, 0.1, 0.2, 0.0),
}

GOLDEN = [
    # -A log(policy)
    ("reinforce", {}, [1.203973, 1.609438, -1.203973, -1.609438, 2 * 0.597837]),
    # a gain beyond 1.3 counts as 1.3, a loss below 0.8 as 0.8, the other two sides are never clipped
    ("ppo_clip", {"eps_high": 0.3}, [-1.3, -0.5, 1.5, 0.8, -2.2]),
    ("dapo_clip", {}, [-1.28, -0.5, 1.5, 0.8, -2.2]),
    # 1.5 with A < 0 costs no more than 1.2
    ("dual_clip", {"c": 1.2}, [-1.2, -0.5, 1.2, 0.8, -2.2]),
    ("two_sided_clip", {"delta": 1.4}, [-1.2, -0.5, 1.4, 0.8, -2.2]),
    # the second sequence has mean log(anchor / policy) = (-0.405465 + 0.693147) / 2 = 0.143841, and A < 0
    ("opsm_clip", {"delta": 0.1}, [-1.2, -0.5, 0, 0, -2.2]),
    ("opsm_clip", {"delta": 0.2}, [-1.2, -0.5, 1.5, 0.8, -2.2]),
    # 5 tokens, 2 of them right: 0.1 * 5 / 2 = 0.25 of -log(policy) on top
    ("vapo_clip", {}, [-1.28 + 0.25 * 1.203973, -0.5 + 0.25 * 1.609438, 1.5, 0.8, -2.2]),
    # s = sqrt(1.5 * 0.5) = 0.866025, twice; with A < 0 it is held at 0.95. 1.1 is held at 1.05
    ("gspo", {"eps_low": 0.05, "eps_high": 0.05}, [-0.866025, -0.866025, 0.95, 0.95, -2.1]),
    ("gspo_token", {"eps_low": 0.05, "eps_high": 0.05}, [-0.866025, -0.866025, 0.95, 0.95, -2.1]),
    # A > 0: exp((0.4 - 0.693147) / 2) = 0.863662; A < 0: exp((0.405465 - 0.4) / 2) = 1.002736; 2 * 1.1
    ("gmpo", {}, [-0.863662, -0.863662, 1.002736, 1.002736, -2.2]),
    # weights 1.2, 0.7, 1.2, 0.7, 1.1
    (
        "cispo",
        {"eps_low": 0.3, "eps_high": 0.2},
        [1.2 * 1.203973, 0.7 * 1.609438, -1.2 * 1.203973, -0.7 * 1.609438, 2.2 * 0.597837],
    ),
    # weights 1, 1, then 1.5 * 0.5 = 0.75 for both with A < 0
    ("topr", {}, [1.203973, 1.609438, -0.75 * 1.203973, -0.75 * 1.609438, 2 * 0.597837]),
    ("topr", {"level": "token"}, [1.203973, 1.609438, -1.203973, -0.5 * 1.609438, 2 * 0.597837]),
    # policy - anchor = 0.1, -0.2, 0.1, -0.2, 0.05: the first (A > 0) is above 0.08, the fourth (A < 0) below -0.15.
    # The others weigh 0.5, 1.4 (cut) and 1.1
    (
        "dppo_tv",
        {"delta_low": 0.15, "delta_high": 0.08, "cap": 1.4},
        [0, 0.5 * 1.609438, -1.4 * 1.203973, 0, 2.2 * 0.597837],
    ),
    # 0.2 ln(0.2 / 0.3) + 0.8 ln(0.8 / 0.7) = 0.025732; 0.4 ln(0.4 / 0.2) + 0.6 ln(0.6 / 0.8) = 0.104650; the last
    # 0.005025. The first (up, A > 0) is above 0.02, the fourth (down, A < 0) above 0.1; second and third move back
    (
        "dppo_kl",
        {"delta_low": 0.1, "delta_high": 0.02, "cap": 1.4},
        [0, 0.5 * 1.609438, -1.4 * 1.203973, 0, 2.2 * 0.597837],
    ),
    # 4 sigmoid(0.5), 4 sigmoid(-0.5); 2 sigmoid(1), 2 sigmoid(-1); 4 sigmoid(0.1)
    ("sapo", {"tau_neg": 2.0}, [-2.489837, -1.510163, 1.462117, 0.537883, -2 * 2.099917]),
    # 0.25 (log r)^2 on top: 0.041101, 0.120113, 0.041101, 0.120113, 0.002271
    (
        "dro",
        {"beta": 0.5},
        [1.203973 + 0.041101, 1.609438 + 0.120113, -1.203973 + 0.041101, -1.609438 + 0.120113, 1.195674 + 0.002271],
    ),
    # means 0.4 and -1.244932; covariances 0.0246, -0.2187, -0.0573, 0.5103, 1.0354. Clipped already: first and fourth.
    # int(0.4 * 5) = 2 of the open three, those with the draws 0.2 and 0.5, lose their loss
    ("clip_cov", {"share": 0.4, "cov_low": -0.3, "cov_high": 2.0}, [-1.2, -0.5, 0, 0.8, 0]),
    # one of the open ones only, the others are out of bounds
    ("clip_cov", {"share": 0.4, "cov_low": -0.1, "cov_high": 1.0}, [-1.2, -0.5, 0, 0.8, -2.2]),
    ("clip_cov", {}, [-1.2, -0.5, 1.5, 0.8, 0]),
    # the two largest: 2 |log r| on top, 2 * 0.693147 and 2 * 0.095310
    ("kl_cov", {"share": 0.4, "kl_coef": 2.0}, [-1.5, -0.5, 1.5, 0.5 + 1.386294, -2.2 + 0.190620]),
]


@pytest.mark.parametrize(("name", "parameters", "wanted"), GOLDEN)
def test_losses_are_those_worked_out_by_hand(name, parameters, wanted):
    losses = call_whole(functools.partial(POLICY_LOSSES[name], **parameters), INPUTS)
    torch.testing.assert_close(losses.loss_T, doubles(*wanted, 0), rtol=0, atol=2e-6)


def test_every_loss_has_a_golden_value():
    assert {case[0] for case in GOLDEN} == POLICY_LOSSES.keys()


# --- gradients of the policy's log-probability, where the value does not tell


def gradient_of(name: str, **parameters) -> torch.Tensor:
    policy = INPUTS["policy_logprobs_T"].clone().requires_grad_()
    bound = functools.partial(POLICY_LOSSES[name], **parameters)
    call_whole(bound, {**INPUTS, "policy_logprobs_T": policy}).loss_T.sum().backward()
    assert policy.grad is not None
    return policy.grad


GRADIENTS = [
    # none where the clip acts
    ("ppo_clip", {"eps_high": 0.3}, [0, -0.5, 1.5, 0, -2.2]),
    # the capped token has none either
    ("dual_clip", {"c": 1.2}, [0, -0.5, 0, 0, -2.2]),
    # stopped weights: every token keeps a gradient
    ("cispo", {"eps_low": 0.3, "eps_high": 0.2}, [-1.2, -0.7, 1.2, 0.7, -2.2]),
    ("topr", {}, [-1, -1, 0.75, 0.75, -2]),
    ("gspo_token", {"eps_low": 0.05, "eps_high": 0.05}, [-0.866025, -0.866025, 0, 0, 0]),
    # each of the two tokens' losses moves with both log-probabilities, half each
    ("gspo", {"eps_low": 0.05, "eps_high": 0.05}, [-0.866025, -0.866025, 0, 0, 0]),
]


@pytest.mark.parametrize(("name", "parameters", "wanted"), GRADIENTS)
def test_gradients_are_those_worked_out_by_hand(name, parameters, wanted):
    torch.testing.assert_close(gradient_of(name, **parameters), doubles(*wanted, 0), rtol=0, atol=2e-6)


def test_gspo_gives_every_token_the_mean_advantage_of_its_sequence_and_its_token_form_each_its_own():
    inputs = {**INPUTS, "policy_logprobs_T": INPUTS["anchor_logprobs_T"], "advantages_T": doubles(1, 3, 0, 0, 0, 0)}
    for name, wanted in (("gspo", [-2, -2, 0, 0, 0, 0]), ("gspo_token", [-1, -3, 0, 0, 0, 0])):
        policy = INPUTS["anchor_logprobs_T"].clone().requires_grad_()
        losses = call_row(POLICY_LOSSES[name], {**inputs, "policy_logprobs_T": policy})
        losses.loss_T.sum().backward()
        torch.testing.assert_close(policy.grad, doubles(*wanted))


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_at_ratio_one_every_loss_moves_as_reinforce_does(name):
    """Where policy = anchor no trust region acts. The terms that some losses add are switched off."""
    off = {
        "vapo_clip": {"nll_weight": 0.0},
        "kl_cov": {"kl_coef": 0.0},
        "clip_cov": {"cov_low": 50.0, "cov_high": 60.0},
        "sapo": {"tau_pos": 3.0},
    }
    anchor = floats(-1, -2, -3, -0.5, NAN)
    policy = anchor.clone().requires_grad_()
    inputs = {
        "policy_logprobs_T": policy,
        "anchor_logprobs_T": anchor,
        "advantages_T": floats(2, 2, -5, -5, 7),
        "mask_T": flags(1, 1, 1, 1, 0),
        "segments": Segments(torch.tensor([0, 2]), 5),
        "correct_T": flags(1, 1, 0, 0, 0),
        "token_draws_T": torch.rand(5).double(),
    }
    losses = call_whole(functools.partial(POLICY_LOSSES[name], **off.get(name, {})), inputs)
    losses.loss_T.sum().backward()
    torch.testing.assert_close(policy.grad, floats(-2, -2, 5, 5, 0))


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_what_stands_behind_the_mask_reaches_neither_loss_nor_gradient(name):
    for garbage in (NAN, math.inf, -math.inf, 1e30):
        logprobs = floats(-1, -2, garbage, garbage).requires_grad_()
        inputs = {
            "policy_logprobs_T": logprobs,
            "anchor_logprobs_T": floats(-1.1, -1.8, -garbage, NAN),
            "advantages_T": floats(1, 1, NAN, garbage),
            "mask_T": flags(1, 1, 0, 0),
            "segments": Segments(torch.tensor([0, 3]), 4),
            "correct_T": flags(1, 1, 1, 1),
            "token_draws_T": torch.full((4,), 0.5).double(),
        }
        losses = call_whole(POLICY_LOSSES[name], inputs)
        losses.loss_T.sum().backward()
        assert losses.loss_T.isfinite().all() and losses.loss_T[2:].tolist() == [0, 0]
        assert logprobs.grad is not None and logprobs.grad.isfinite().all() and logprobs.grad[2:].tolist() == [0, 0]
        assert all(value is None or math.isfinite(value) for value in values_of(losses.measures).values())


def test_a_ratio_beyond_all_bounds_leaves_the_loss_finite():
    loss = ppo_clip(floats(0), floats(-500), floats(-1), flags(1)).loss_T
    torch.testing.assert_close(loss, floats(math.exp(20)))


def test_clipped_shares_are_measured():
    measured = values_of(call_row(functools.partial(POLICY_LOSSES["dual_clip"], c=1.2), INPUTS).measures)
    assert measured["actor/pg_clipfrac"] == pytest.approx(2 / 5)
    assert measured["actor/pg_clipfrac_lower"] == pytest.approx(1 / 5)
    # 0.405465 - 0.693147 twice, and 0.095310
    assert measured["actor/ppo_kl"] == pytest.approx((2 * 0.287682 - 0.095310) / 5, abs=1e-6)


def test_vapo_without_a_right_answer_is_the_clip_alone():
    wrong = {**INPUTS, "correct_T": flags(0, 0, 0, 0, 0, 0)}
    losses = call_whole(POLICY_LOSSES["vapo_clip"], wrong).loss_T
    torch.testing.assert_close(losses, call_row(POLICY_LOSSES["dapo_clip"], INPUTS).loss_T)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ppo_clip", {"eps_low": 1.5}),
        ("dual_clip", {"c": 1.0}),
        ("two_sided_clip", {"delta": 1.1}),
        ("gmpo", {"eps_low": -0.1}),
        ("topr", {"level": "turn"}),
        ("dppo_tv", {"delta_high": 2.0}),
        ("dppo_kl", {"cap": 0.5}),
        ("sapo", {"tau_pos": 0.0}),
        ("dro", {"beta": -1.0}),
        ("clip_cov", {"cov_low": 5.0, "cov_high": 1.0}),
        ("kl_cov", {"share": 0.0}),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameters):
    with pytest.raises(AssertionError):
        call_whole(functools.partial(POLICY_LOSSES[name], **parameters), INPUTS)


# --- critic

VALUES = {
    "values_T": doubles(1, 2, 0.5, NAN),
    "old_values_T": doubles(0.5, 2, 1, NAN),
    "returns_T": doubles(2, 0, 1, NAN),
    "mask_T": flags(1, 1, 1, 0),
}
VALUE_GOLDEN = {
    "squared_error": [0.5 * 1, 0.5 * 4, 0.5 * 0.25, 0],
    # held at 0.7 and 0.8: 1.3^2 > 1^2, 4 = 4, 0.2^2 < 0.5^2
    "clipped_squared_error": [0.5 * 1.69, 0.5 * 4, 0.5 * 0.25, 0],
}


@pytest.mark.parametrize("name", sorted(VALUE_LOSSES))
def test_value_losses_are_those_worked_out_by_hand(name):
    values = VALUES["values_T"].clone().requires_grad_()
    losses = call_row(VALUE_LOSSES[name], {**VALUES, "values_T": values})
    torch.testing.assert_close(losses.loss_T, doubles(*VALUE_GOLDEN[name]))
    losses.loss_T.sum().backward()
    assert values.grad is not None
    # the clipped value of the first token is a constant: no gradient
    torch.testing.assert_close(values.grad, doubles(-1 if name == "squared_error" else 0, 2, -0.5, 0))
    measured = values_of(losses.measures)
    assert measured["critic/vpred_mean"] == pytest.approx(3.5 / 3)
    if name == "clipped_squared_error":
        assert measured["critic/vf_clipfrac"] == pytest.approx(1 / 3)


# --- divergence from a reference: d = log(policy / reference) = -ln 2, ln 2

DIVERGENCE = {
    "policy_logprobs_T": doubles(0.3, 0.2, NAN).log(),
    "ref_logprobs_T": doubles(0.6, 0.1, 0.0).log(),
    "behaviour_logprobs_T": doubles(0.15, 0.4, NAN).log(),
    "mask_T": flags(1, 1, 0),
}
LN2 = math.log(2)
KL_GOLDEN = {  # values and gradients
    "k1": ([-LN2, LN2], [1, 1]),
    "k2": ([LN2**2 / 2, LN2**2 / 2], [-LN2, LN2]),
    "k3": ([2 - 1 - LN2, 0.5 - 1 + LN2], [1 - 2, 1 - 0.5]),
    "abs": ([LN2, LN2], [-1, 1]),
    "k3_straight": ([2 - 1 - LN2, 0.5 - 1 + LN2], [-LN2, LN2]),
    # weights 2 and 0.5 on k3; the gradient is weight * (k3 + its own)
    "k3_corrected": ([2 * (1 - LN2), 0.5 * (LN2 - 0.5)], [2 * (1 - LN2 - 1), 0.5 * (LN2 - 0.5 + 0.5)]),
}


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_divergences_and_their_gradients_are_those_worked_out_by_hand(name):
    policy = DIVERGENCE["policy_logprobs_T"].clone().requires_grad_()
    divergence = call_row(KL_ESTIMATORS[name], {**DIVERGENCE, "policy_logprobs_T": policy})
    values, gradients = KL_GOLDEN[name]
    torch.testing.assert_close(divergence, doubles(*values, 0))
    divergence.sum().backward()
    torch.testing.assert_close(policy.grad, doubles(*gradients, 0))


def test_k3_of_one_token_is_bounded():
    assert KL_ESTIMATORS["k3"](floats(-30), floats(-1), flags(1)).tolist() == [10.0]


def test_only_k1_is_of_no_use_in_a_loss():
    assert [name for name, function in KL_ESTIMATORS.items() if not facts_of(function).as_loss] == ["k1"]


def test_a_divergence_in_the_reward_is_taken_off_weighted_tokens_only():
    got = penalised_rewards(doubles(0, 1, 5), doubles(2, -3, NAN), flags(1, 1, 0), coef=0.5)
    assert got.tolist() == [-1, 2.5, 5]
