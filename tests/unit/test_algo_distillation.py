"""The divergence from a teacher: values by hand, and what a divergence must be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algo import DISTILLATIONS
from rlsys.algo.distillation import sampled_reverse_kl, topk_reverse_kl

LOGITS = st.lists(st.floats(-4, 4), min_size=5, max_size=5)


def test_sampled_reverse_kl_is_the_log_ratio_of_the_sampled_token():
    policy, teacher = torch.tensor([0.5, 0.2, 0.9]).log(), torch.tensor([0.25, 0.4, 0.9]).log()
    result = sampled_reverse_kl(policy, teacher, torch.tensor([True, True, False]))
    torch.testing.assert_close(result, torch.tensor([math.log(2.0), -math.log(2.0), 0.0]))


def test_topk_reverse_kl_of_two_candidates_and_the_rest():
    # candidates have 0.5 and 0.3 of the policy, 0.6 and 0.2 of the teacher: 0.2 is left to both
    policy, teacher = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.6, 0.2]]).log()
    wanted = 0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.2)
    assert topk_reverse_kl(policy, teacher, torch.tensor([True])).item() == pytest.approx(wanted, rel=1e-5)
    # 0.5 against 0.8 for the one candidate: 0.5 and 0.2 are left
    policy, teacher = torch.tensor([[0.5]]).log(), torch.tensor([[0.8]]).log()
    wanted = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert topk_reverse_kl(policy, teacher, torch.tensor([True])).item() == pytest.approx(wanted, rel=1e-5)


@given(LOGITS, LOGITS, st.integers(1, 4))
def test_topk_reverse_kl_is_a_lower_bound_of_the_whole_divergence_and_never_negative(policy, teacher, k):
    p, q = (torch.tensor(values, dtype=torch.float64).log_softmax(0) for values in (policy, teacher))
    top = q.topk(k).indices
    part = topk_reverse_kl(p[top][None], q[top][None], torch.tensor([True])).item()
    whole = float((p.exp() * (p - q)).sum())
    assert -1e-9 <= part <= whole + 1e-9


def test_over_all_but_one_token_it_is_the_whole_divergence_with_its_gradient():
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64).log_softmax(1)
    first, second = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    part = topk_reverse_kl(first.log_softmax(1)[:, :4], teacher[:, :4], torch.ones(6, dtype=torch.bool))
    p = second.log_softmax(1)
    whole = (p.exp() * (p - teacher)).sum(1)
    torch.testing.assert_close(part, whole)
    part.sum().backward()
    whole.sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_what_stands_without_weight_reaches_neither_value_nor_gradient(name):
    policy = torch.tensor([[-0.5], [float("nan")], [-1.0]], requires_grad=True)
    teacher, mask = torch.tensor([[-0.7], [float("nan")], [-2.0]]), torch.tensor([True, False, True])
    given = (policy, teacher) if name == "topk_reverse_kl" else (policy[:, 0], teacher[:, 0])
    result = DISTILLATIONS[name](*given, mask)
    assert result[1] == 0.0 and bool(result.isfinite().all())
    if result.requires_grad:
        result.sum().backward()
        assert bool(policy.grad.isfinite().all()) and policy.grad[1] == 0.0


def test_the_gradient_over_candidates_is_that_of_finite_differences():
    torch.manual_seed(1)
    policy = torch.randn(4, 6, dtype=torch.float64).log_softmax(1)[:, :3].requires_grad_()
    teacher = torch.randn(4, 6, dtype=torch.float64).log_softmax(1)[:, :3]
    mask = torch.tensor([True, True, False, True])
    torch.autograd.gradcheck(lambda logprobs: topk_reverse_kl(logprobs, teacher, mask), (policy,))
