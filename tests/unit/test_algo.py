"""Advantages, losses, corrections and measures against values worked out by hand."""

import math
from functools import partial

import pytest
import torch

from rlsys.algo.advantages import ADVANTAGES, grpo
from rlsys.algo.corrections import CORRECTIONS, none, tis
from rlsys.algo.losses import POLICY_LOSSES, ppo_clip, reinforce
from rlsys.algo.measures import EffectiveShare, Max, Mean, Min, merge
from rlsys.algo.objective import policy_objective


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def flags(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def values_of(measures) -> dict[str, float]:
    return {name: measure.value() for name, measure in measures.items()}


def test_grpo_standardises_within_each_group_with_the_unbiased_std():
    # group one: mean 1, squares 1 + 0 + 1, variance 2 / (3 - 1) = 1; group two: mean 2, variance 8 / 1
    advantages = grpo(floats(0, 1, 2, 0, 4), torch.tensor([0, 3]), eps=0.0)
    torch.testing.assert_close(advantages, floats(-1, 0, 1, -(0.5**0.5), 0.5**0.5))


def test_grpo_adds_eps_to_the_std_and_can_leave_the_std_out():
    torch.testing.assert_close(grpo(floats(0, 1, 2), torch.tensor([0]), eps=1.0), floats(-0.5, 0, 0.5))
    torch.testing.assert_close(grpo(floats(0, 4), torch.tensor([0]), scale_by_std=False), floats(-2, 2))


def test_group_without_variance_or_with_one_member_gets_exactly_zero():
    # 0.1 three times does not average to 0.1 in binary, and 1 / eps would blow the rest up
    advantages = grpo(floats(0.1, 0.1, 0.1, 7.0, 1.0, 0.0), torch.tensor([0, 3, 4]))
    assert advantages[:4].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert advantages[4] > 0 > advantages[5]


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


def test_ppo_clip_takes_the_worse_of_free_and_clipped():
    ratios = floats(1.5, 0.5, 1.5, 0.5, 1.1)
    advantages = floats(1, 1, -1, -1, 2)
    anchor = floats(-1, -2, -3, -1, -2)
    policy = (anchor + ratios.log()).requires_grad_()
    losses = ppo_clip(policy, anchor, advantages, flags(1, 1, 1, 1, 1), eps_low=0.2, eps_high=0.3)
    # a gain beyond 1.3 counts as 1.3, a loss below 0.8 as 0.8, the other two sides are never clipped
    torch.testing.assert_close(losses.loss_T, floats(-1.3, -0.5, 1.5, 0.8, -2.2))
    measured = values_of(losses.measures)
    assert measured["actor/pg_clipfrac"] == pytest.approx(2 / 5)
    assert measured["actor/ppo_kl"] == pytest.approx(-float(ratios.log().mean()))
    losses.loss_T.sum().backward()
    torch.testing.assert_close(policy.grad, floats(0, -0.5, 1.5, 0, -2.2))  # none where the clip acts


def test_at_ratio_one_ppo_clip_has_the_gradient_of_reinforce():
    anchor, advantages, mask = floats(-1, -2, -3), floats(2, -1, 5), flags(1, 1, 0)
    gradients = []
    for loss in (ppo_clip, reinforce):
        policy = anchor.clone().requires_grad_()
        loss(policy, anchor, advantages, mask).loss_T.sum().backward()
        gradients.append(policy.grad)
    torch.testing.assert_close(gradients[0], floats(-2, 1, 0))
    torch.testing.assert_close(gradients[1], floats(-2, 1, 0))


def test_a_token_outside_the_mask_reaches_neither_loss_nor_gradient_whatever_stands_there():
    for loss in POLICY_LOSSES.values():
        policy = floats(-1, math.inf).requires_grad_()
        result = loss(policy, floats(-1, math.nan), floats(1, math.nan), flags(1, 0)).loss_T
        result.sum().backward()
        assert result[1] == 0.0 and policy.grad[1] == 0.0
    for correction in CORRECTIONS.values():
        assert correction(floats(-1, math.nan), floats(-1, math.inf), flags(1, 0)).weights_T.isfinite().all()


def test_log_ratio_is_bounded_so_that_the_loss_stays_finite():
    loss = ppo_clip(floats(0), floats(-500), floats(-1), flags(1)).loss_T
    torch.testing.assert_close(loss, floats(math.exp(20)))


def test_tis_cuts_the_ratio_at_the_cap_and_measures_it():
    k = floats(0.5, 1.0, 4.0, 99.0)
    behaviour = floats(-1, -2, -6, -7).requires_grad_()
    proximal = (behaviour.detach() + k.log()).requires_grad_()
    result = tis(proximal, behaviour, flags(1, 1, 1, 0), cap=2.0)
    assert not result.weights_T.requires_grad
    torch.testing.assert_close(result.weights_T[:3], floats(0.5, 1.0, 2.0))
    measured = values_of(result.measures)
    logs = [math.log(0.5), 0.0, math.log(4.0)]
    assert measured["rollout_corr/is_truncated"] == pytest.approx(1 / 3)
    assert measured["rollout_corr/is_mean"] == pytest.approx(3.5 / 3)
    assert measured["rollout_corr/is_max"] == pytest.approx(4.0)
    assert measured["rollout_corr/ess"] == pytest.approx(3.5**2 / (3 * (0.25 + 1 + 4)))
    assert measured["rollout_corr/kl"] == pytest.approx(-sum(logs) / 3)
    assert measured["rollout_corr/kl_k3"] == pytest.approx((5.5 - 3 - sum(logs)) / 3)
    assert measured["rollout_corr/chi2"] == pytest.approx((0.25 + 1 + 16) / 3 - 1)


def test_without_a_correction_every_weight_is_one_and_the_distance_is_still_measured():
    result = none(floats(-1, -1), floats(-1, -3), flags(1, 1))
    assert result.weights_T.tolist() == [1.0, 1.0]
    assert values_of(result.measures)["rollout_corr/kl"] == pytest.approx(-1.0)


def test_objective_is_a_sum_of_weight_times_loss():
    proximal, behaviour = floats(-1, -1, -1, -1), floats(-1, -2, -3, -1.5)
    policy = proximal.clone().requires_grad_()
    result = policy_objective(
        policy_logprobs_T=policy,
        proximal_logprobs_T=proximal,
        behaviour_logprobs_T=behaviour,
        advantages_T=floats(1, 2, -3, 9),
        mask_T=flags(1, 1, 1, 0),
        on_policy_mask_T=flags(0, 1, 0, 0),
        loss=partial(ppo_clip, eps_high=0.3),
        correction=partial(tis, cap=3.0),
    )
    # weights 1, e, 3 (e^2 cut); losses -1, -2, 3
    assert result.loss_sum.item() == pytest.approx(-1 - 2 * math.e + 9)
    result.loss_sum.backward()
    torch.testing.assert_close(policy.grad, floats(-1, -2 * math.e, 9, 0))
    measured = values_of(result.measures)
    assert measured["actor/pg_loss"] == pytest.approx((8 - 2 * math.e) / 3)
    assert measured["critic/advantages/mean"] == 0.0
    assert (measured["critic/advantages/max"], measured["critic/advantages/min"]) == (2.0, -3.0)
    assert measured["rollout_corr/logprob_abs_diff_mean"] == pytest.approx(1.0)
    assert measured["rollout_corr/logprob_abs_diff_max"] == pytest.approx(2.0)
    assert measured["rollout_corr/on_policy_logprob_abs_diff_mean"] == pytest.approx(1.0)


def test_measures_of_parts_combine_to_the_measure_of_the_whole():
    torch.manual_seed(0)
    values, mask = torch.randn(40), torch.rand(40) < 0.5
    for kind in (Mean, Max, Min, EffectiveShare):
        parts = [{"m": kind.of(values[here], mask[here])} for here in (slice(0, 3), slice(3, 30), slice(30, 40))]
        merged = merge(merge(parts[0], parts[1]), parts[2])
        assert merged["m"].value() == pytest.approx(kind.of(values, mask).value())
    chosen = values[mask].double()
    assert Mean.of(values, mask).value() == pytest.approx(float(chosen.mean()))
    assert Min.of(values, mask).value() == float(chosen.min())
    assert Max.of(values, mask).value() == float(chosen.max())


def test_measure_of_nothing_has_no_value():
    for kind in (Mean, Max, Min, EffectiveShare):
        assert kind.of(floats(1.0), flags(0)).value() is None


def test_registries_name_every_row():
    assert (sorted(ADVANTAGES), sorted(POLICY_LOSSES), sorted(CORRECTIONS)) == (
        ["grpo"],
        ["ppo_clip", "reinforce"],
        ["none", "tis"],
    )
