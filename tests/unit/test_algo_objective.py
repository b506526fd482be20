"""The objective put together, and its diagnostics, against values worked out by hand."""

import math
from functools import partial

import pytest
import torch

from rlsys.algo import AGGREGATIONS, CORRECTIONS, KL_ESTIMATORS, POLICY_LOSSES
from rlsys.algo.corrections import tis
from rlsys.algo.losses import ppo_clip
from rlsys.algo.objective import objective_count, objective_statistics, policy_objective, settle_rows
from rlsys.algo.segments import Segments
from tests.unit.test_algo import doubles, flags, floats, values_of

none, reinforce = CORRECTIONS["none"], POLICY_LOSSES["reinforce"]


def inputs_of_four() -> dict:
    """Tokens with k = 1, e, e^2 and, without weight, e^0.5; the policy is the proximal one."""
    proximal = floats(-1, -1, -1, -1)
    return {
        "policy_logprobs_T": proximal.clone().requires_grad_(),
        "proximal_logprobs_T": proximal,
        "behaviour_logprobs_T": floats(-1, -2, -3, -1.5),
        "advantages_T": floats(1, 2, -3, 9),
        "mask_T": flags(1, 1, 1, 0),
        "on_policy_mask_T": flags(0, 1, 0, 0),
        "segments": Segments(torch.tensor([0, 2]), 4),
    }


def test_objective_is_a_sum_of_weight_times_loss():
    inputs = inputs_of_four()
    result = policy_objective(**inputs, loss=partial(ppo_clip, eps_high=0.3), correction=partial(tis, cap=3.0))
    # weights 1, e, 3 (e^2 cut); losses -1, -2, 3
    assert result.loss_sum.item() == pytest.approx(-1 - 2 * math.e + 9)
    assert result.count is not None and result.count.item() == 3.0
    result.loss_sum.backward()
    torch.testing.assert_close(inputs["policy_logprobs_T"].grad, floats(-1, -2 * math.e, 9, 0))
    measured = values_of(result.measures)
    assert measured["actor/pg_loss"] == pytest.approx((8 - 2 * math.e) / 3)
    assert measured["critic/advantages/mean"] == 0.0
    assert (measured["critic/advantages/max"], measured["critic/advantages/min"]) == (2.0, -3.0)


def test_the_anchor_is_the_proximal_or_the_behaviour_policy():
    """PPO's ratio at the behaviour anchor is e for the second token: cut at 1.2, no gradient."""
    inputs = inputs_of_four()
    result = policy_objective(**inputs, loss=ppo_clip, correction=none, anchor="behaviour")
    assert result.loss_sum.item() == pytest.approx(-1 - 2 * 1.2 + 3 * math.e**2, rel=1e-6)
    result.loss_sum.backward()
    torch.testing.assert_close(inputs["policy_logprobs_T"].grad, floats(-1, 0, 3 * math.e**2, 0))


def test_decoupled_is_the_clip_at_the_proximal_anchor_times_the_ratio_to_behaviour():
    inputs = inputs_of_four()
    inputs["policy_logprobs_T"] = (inputs["proximal_logprobs_T"] + floats(1.1, 1.5, 1.1, 1).log()).requires_grad_()
    result = policy_objective(**inputs, loss=ppo_clip, correction=partial(tis, cap=math.inf))
    wanted = -1.1 - math.e * 2 * 1.2 + math.e**2 * 3 * 1.1
    assert result.loss_sum.item() == pytest.approx(wanted, rel=1e-6)


def test_a_rejection_takes_tokens_out_of_the_loss_the_count_and_the_lengths():
    inputs = inputs_of_four()
    reject = partial(CORRECTIONS["reject_k1"], over="token", low=0.5, high=2.0)  # keeps the first token only
    rows = {"correction": partial(tis, cap=2.0), "rejections": (reject,)}
    result = policy_objective(**inputs, **rows, loss=reinforce, aggregation=AGGREGATIONS["seq_mean_token_mean"])
    # the first sequence has one token left, -A log(policy) = 1, the second none: it is no sequence
    assert result.count is not None and result.count.item() == 1.0
    assert result.loss_sum.item() == pytest.approx(1.0)
    count = objective_count(**rows, aggregation=AGGREGATIONS["seq_mean_token_mean"], **inputs)
    assert count is not None and count.item() == 1.0
    measured = values_of(result.measures)
    assert measured["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(2 / 3)
    assert measured["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(1 / 2)
    assert measured["critic/advantages/mean"] == 1.0


def test_a_rejection_can_be_the_correction_itself():
    inputs = inputs_of_four()
    reject = partial(CORRECTIONS["reject_k1"], over="token", low=0.5, high=2.0)
    result = policy_objective(**inputs, loss=reinforce, correction=reject)
    assert result.count is not None and result.count.item() == 1.0 and result.loss_sum.item() == pytest.approx(1.0)
    count = objective_count(correction=reject, **inputs)
    assert count is not None and count.item() == 1.0


def test_a_token_has_to_pass_every_rejection():
    inputs = inputs_of_four()
    above, below = (
        partial(CORRECTIONS["reject_k1"], over="token", low=low, high=high) for low, high in ((0.5, 3.0), (2.0, 9.0))
    )
    for rejections in ((above, below), (below, above)):  # k = 1, e, e^2: only e passes both
        result = policy_objective(**inputs, loss=reinforce, correction=none, rejections=rejections)
        assert result.count is not None and result.count.item() == 1.0
        assert result.loss_sum.item() == pytest.approx(2.0)
        count = objective_count(correction=none, rejections=rejections, **inputs)
        assert count is not None and count.item() == 1.0


def test_a_weight_of_zero_keeps_its_token_in_the_count():
    inputs = inputs_of_four()
    icepop = partial(CORRECTIONS["icepop"], low=0.5, high=2.0)
    result = policy_objective(**inputs, loss=reinforce, correction=icepop)
    assert result.count is not None and result.count.item() == 3.0 and result.loss_sum.item() == pytest.approx(1.0)


def test_a_constant_divides_in_the_sum_and_leaves_no_count():
    result = policy_objective(
        **inputs_of_four(), loss=reinforce, correction=tis, aggregation=partial(AGGREGATIONS["constant"], tokens=10)
    )
    assert result.count is None
    # -A log(policy) = 1, 2, -3 with weights 1, 2, 2
    wanted = (1 + 4 - 6) / 10
    assert result.loss_sum.item() == pytest.approx(wanted)
    assert values_of(result.measures)["actor/pg_loss"] == pytest.approx(wanted)


def test_divergence_and_entropy_are_aggregated_with_the_loss_and_weighted_by_their_coefficients():
    inputs = inputs_of_four()
    entropy = floats(2, 4, 8, math.nan).requires_grad_()
    result = policy_objective(
        **inputs,
        loss=reinforce,
        correction=none,
        kl=KL_ESTIMATORS["k2"],
        kl_coef=0.1,
        entropy_coef=0.01,
        ref_logprobs_T=floats(-1, -3, -1, math.nan),
        entropy_T=entropy,
    )
    # -A log(policy) = 1, 2, -3; k2 = 0, 2, 0; entropies 14
    assert result.loss_sum.item() == pytest.approx(0 + 0.1 * 2 - 0.01 * 14, rel=1e-5)
    result.loss_sum.backward()
    torch.testing.assert_close(inputs["policy_logprobs_T"].grad, floats(-1, -2 + 0.1 * 2, 3, 0))
    torch.testing.assert_close(entropy.grad, floats(-0.01, -0.01, -0.01, 0))
    assert values_of(result.measures)["actor/kl_loss"] == pytest.approx(2 / 3)
    assert values_of(result.measures)["actor/pg_loss"] == pytest.approx(0.0)


def test_a_row_of_batch_scope_is_settled_before_the_pass():
    inputs = inputs_of_four()
    rows = {"loss": POLICY_LOSSES["kl_cov"], "correction": CORRECTIONS["normalised_tis"]}
    statistics = objective_statistics(**rows, **inputs)
    result = policy_objective(**rows, **inputs, settled=settle_rows(**rows, statistics=statistics))
    # weights 1, 2, 2 (cut), mean 5 / 3; losses -A r = -1, -2, 3; the KL term is 0 where policy = anchor
    assert result.loss_sum.item() == pytest.approx((-1 - 4 + 6) / (5 / 3), rel=1e-6)
    with pytest.raises(TypeError, match="settled"):
        policy_objective(**rows, **inputs)


def test_an_input_that_a_row_lacks_is_named():
    inputs = inputs_of_four()
    del inputs["segments"]
    policy_objective(**inputs, loss=ppo_clip, correction=none)
    with pytest.raises(TypeError, match="gspo asks for segments"):
        policy_objective(**inputs, loss=POLICY_LOSSES["gspo"], correction=none)


def test_how_far_the_policies_are_apart_is_always_measured():
    """Three sequences: k = 0.5, 4 | 2 | and one without a weighted token."""
    behaviour = doubles(0.4, 0.1, 0.2, 0.0).log()
    proximal = doubles(0.2, 0.4, 0.4, 0.5).log()
    result = policy_objective(
        policy_logprobs_T=proximal,
        proximal_logprobs_T=proximal,
        behaviour_logprobs_T=behaviour,
        advantages_T=doubles(1, 1, 1, math.nan),
        mask_T=flags(1, 1, 1, 0),
        on_policy_mask_T=flags(0, 0, 1, 0),
        segments=Segments(torch.tensor([0, 2, 3]), 4),
        loss=reinforce,
        correction=tis,
    )
    ln2 = math.log(2)
    wanted = {
        "kl": -(-1 + 2 + 1) * ln2 / 3,
        "k3_kl": ((0.5 - 1 + ln2) + (4 - 1 - 2 * ln2) + (2 - 1 - ln2)) / 3,
        "chi2_token": (0.25 + 16 + 4) / 3 - 1,
        "chi2_seq": (2**2 + 2**2) / 2 - 1,
        "ratio_max": 4.0,
        "logprob_abs_diff_mean": (1 + 2 + 1) * ln2 / 3,
        "logprob_abs_diff_max": 2 * ln2,
        "on_policy_logprob_abs_diff_mean": ln2,
        # 1 / sqrt(0.2 * 0.4) and 1 / 0.4; 1 / sqrt(0.4 * 0.1) = 5 and 1 / 0.2 = 5
        "training_ppl": (0.08**-0.5 + 2.5) / 2,
        "training_log_ppl": -(math.log(0.08) / 2 + math.log(0.4)) / 2,
        "rollout_ppl": 5.0,
        "rollout_log_ppl": math.log(5),
        # log(sqrt(0.04 / 0.08)) and log(0.2 / 0.4)
        "log_ppl_diff": (-0.5 * ln2 - ln2) / 2,
        "log_ppl_abs_diff": (0.5 * ln2 + ln2) / 2,
        "log_ppl_diff_max": -0.5 * ln2,
        "log_ppl_diff_min": -ln2,
        "ppl_ratio": (0.5**0.5 + 0.5) / 2,
        # weights 0.5, 2, 2
        "rollout_is_mean": 1.5,
        "rollout_is_std": ((1 + 0.25 + 0.25) / 3) ** 0.5,
        "rollout_is_max": 2.0,
        "rollout_is_min": 0.5,
        "rollout_is_eff_sample_size": 4.5**2 / (3 * (0.25 + 4 + 4)),
        "rollout_is_ratio_fraction_high": 1 / 3,
        "rollout_is_ratio_fraction_low": 0.0,
        "rollout_is_oob_ratio": 1 / 3,
        "rollout_rs_masked_fraction": 0.0,
        "rollout_rs_seq_masked_fraction": 0.0,
    }
    measured = values_of(result.measures)
    got = {name.removeprefix("rollout_corr/"): v for name, v in measured.items() if name.startswith("rollout_corr/")}
    assert got == pytest.approx(wanted, rel=1e-6)


def test_a_microbatch_without_a_weighted_token_adds_nothing():
    inputs = {**inputs_of_four(), "mask_T": flags(0, 0, 0, 0)}
    for aggregation in ("token_mean", "seq_mean_token_mean"):
        result = policy_objective(**inputs, loss=ppo_clip, correction=none, aggregation=AGGREGATIONS[aggregation])
        assert result.loss_sum.item() == 0.0 and result.count is not None and result.count.item() == 0.0
        assert values_of(result.measures)["actor/pg_loss"] is None
