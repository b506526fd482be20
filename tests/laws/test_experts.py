"""A mixture of experts: the balance of its load, and experts that are shared out, in every layout the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlsys.algo import ADVANTAGES, CORRECTIONS, KL_ESTIMATORS, POLICY_LOSSES, VALUE_LOSSES
from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from rlsys.train.critic import CriticPlan
from rlsys.train.objective import Divergence, Objective
from rlsys.train.terms import Term
from tests.laws.layouts import MODELS, make_folder
from tests.laws.learner_ranks import is_of_layout, make_groups, section
from tests.laws.test_gradient import (
    EXACT,
    OLDEST_STEP,
    VERSION,
    gradient_of,
    packed,
    padded_rows,
    reference_logprobs,
    reference_step,
    relative_difference,
)

pytestmark = pytest.mark.engines

COEF = 2.0  # large beside the loss, so that its gradient shows
GROUPS = make_groups(VERSION)
SAMPLES = build(GROUPS, advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0)
EXPERTS = [name for name, model in MODELS.items() if model.has_experts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Plain transformers, one sequence after the other. Gradients by the names of files.

    Attributes:
        path: the model's folder.
        gradient: of the loss.
        balance: the balance loss over all tokens, and its gradient.
        logits: of the routers, by layer, all tokens.
        experts_per_token: K.
    """

    path: str
    gradient: dict[str, np.ndarray]
    balance: tuple[float, dict[str, np.ndarray]]
    logits: list[torch.Tensor]
    experts_per_token: int


@pytest.fixture(scope="module", params=EXPERTS)
def reference(request, tmp_path_factory) -> Reference:
    path = make_folder(request.param, tmp_path_factory.mktemp("models"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    _, gradient = reference_step(model, GROUPS)
    model.zero_grad()
    each = [
        model(torch.tensor(sample.token_ids_T).long()[None], output_router_logits=True).router_logits
        for sample in SAMPLES
    ]
    logits = [torch.cat(layer) for layer in zip(*each, strict=True)]
    chosen = model.config.num_experts_per_tok
    losses = [load_balancing_loss_func((layer,), layer.shape[1], chosen) for layer in logits]
    balance = torch.stack(losses).mean()
    balance.backward()
    of_balance = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    zeros = {name: np.zeros_like(value) for name, value in gradient.items()}
    return Reference(
        path=path,
        gradient=in_files(model, gradient),
        balance=(balance.item(), in_files(model, {**zeros, **of_balance})),
        logits=[layer.detach() for layer in logits],
        experts_per_token=chosen,
    )


def in_files(model, gradient: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {name: torch.from_numpy(value) for name, value in gradient.items()}
    return {name: value.numpy() for name, value in revert_weight_conversion(model, tensors).items()}


def total(one: dict[str, np.ndarray], other: dict[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    return {name: value + factor * other[name] for name, value in one.items()}


@pytest.mark.parametrize(
    ("ranks_", "budget", "keys"),
    [
        (1, 4096, {}),
        (1, 64, {"activation_checkpointing": True}),
        (1, None, {}),  # padded rows
        (2, 64, {}),
        (2, 128, {"zero_stage": 3, "activation_checkpointing": True}),
        (2, 64, {"zero_stage": 2, "expert_parallel": 2}),
        (1, 128, {"zero_stage": 3, "sequence_parallel": 2}),
    ],
)
def test_balance_is_that_of_all_tokens_of_a_step_in_every_layout(ranks, reference, ranks_, budget, keys):
    batches = packed(SAMPLES, ranks_, budget) if budget else lambda rank: [padded_rows(SAMPLES)]
    train = section(ranks=ranks_, router_aux_coef=COEF, **{"zero_stage": 0, **keys})
    outcomes = ranks.run(train.processes, batches, model_path=reference.path, train=train)
    balance, gradient = reference.balance
    wanted = total(reference.gradient, gradient, COEF)
    assert relative_difference(gradient_of(outcomes[0]), wanted) <= EXACT
    assert relative_difference(reference.gradient, wanted) > 0.1  # it shows
    for outcome in outcomes:
        metrics = outcome.metrics[0]
        assert metrics["router/balance_loss"] == pytest.approx(balance, rel=1e-5)
        counts = [
            torch.bincount(layer.topk(reference.experts_per_token).indices.flatten()) for layer in reference.logits
        ]
        busiest = max(float(count.max() / count.sum()) * len(count) for count in counts)
        assert metrics["router/max_load"] == pytest.approx(busiest, rel=1e-6)
        entropies = [torch.distributions.Categorical(logits=layer).entropy().mean() for layer in reference.logits]
        assert metrics["router/entropy"] == pytest.approx(float(torch.stack(entropies).mean()), rel=1e-5)
        assert metrics["router/dead_experts"] == 0.0


def test_balance_by_microbatch_would_be_another_one(reference):
    """What law 4 guards against: the mean of the balance losses of sequences is not that of all tokens."""
    lengths = [len(sample.token_ids_T) for sample in SAMPLES]
    by_sequence = [
        float(load_balancing_loss_func((part,), part.shape[1], reference.experts_per_token))
        for layer in reference.logits
        for part in layer.split(lengths)
    ]
    assert np.mean(by_sequence) > 1.01 * reference.balance[0]


@pytest.mark.parametrize(
    ("shared", "zero_stage"), [("expert", 0), ("expert", 1), ("expert", 2), ("sequence", 0), ("sequence", 3)]
)
def test_clipping_goes_by_the_norm_of_the_whole_gradient(ranks, reference, shared, zero_stage):
    norm = sum(float(np.square(value.astype(float)).sum()) for value in reference.gradient.values()) ** 0.5
    ranks_ = 2 if shared == "expert" else 1
    train = section(zero_stage, ranks_, max_grad_norm=norm / 4, **{f"{shared}_parallel": 2})
    outcomes = ranks.run(2, packed(SAMPLES, ranks_, 64), model_path=reference.path, train=train)
    wanted = {name: value / 4 for name, value in reference.gradient.items()}
    assert relative_difference(gradient_of(outcomes[0]), wanted) <= EXACT
    for outcome in outcomes:
        assert outcome.metrics[0]["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_what_leaves_experts_that_are_shared_out_is_the_whole_model(ranks, reference, tmp_path, zero_stage):
    once = packed(SAMPLES, 2, 64)
    outcomes = ranks.run(
        2,
        lambda rank: once(rank) * 2,
        model_path=reference.path,
        train=section(zero_stage, 2, expert_parallel=2, lr=0.25),
        probe=[SAMPLES[0].token_ids_T],
        save_to=str(tmp_path),
    )
    initial, saved = (AutoModelForCausalLM.from_pretrained(path) for path in (reference.path, tmp_path))
    before, after = (in_files(model, dict_of(model)) for model in (initial, saved))
    assert not outcomes[1].after  # the second process takes part, and has nothing to write
    assert outcomes[0].before.keys() == before.keys() and outcomes[0].after.keys() == after.keys()
    for name in before:
        assert np.array_equal(outcomes[0].before[name], before[name]), name
        assert np.array_equal(outcomes[0].after[name], after[name]), name
        assert not np.array_equal(after[name], before[name]), name
    with torch.no_grad():
        wanted = reference_logprobs(saved, torch.tensor(SAMPLES[0].token_ids_T).long(), 1.0).numpy()
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.probe[0][1:], wanted, atol=2e-5)


def dict_of(model) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("shared", "zero_stage"), [("expert", 2), ("sequence", 3)])
def test_the_models_beside_a_policy_that_is_shared_out_are_whole(ranks, reference, shared, zero_stage):
    """The reference, and beside shared experts a critic: two batches measure the same as in one process."""
    divergence = Divergence(estimator=KL_ESTIMATORS["k3"], term=Term(coef=0.1))
    objective = Objective(loss=POLICY_LOSSES["reinforce"], correction=CORRECTIONS["none"], kl=divergence)
    critic = None
    if shared == "expert":
        objective = replace(objective, advantage=ADVANTAGES["gae"])
        critic = CriticPlan(model_path=reference.path, loss=VALUE_LOSSES["squared_error"], lr=0.25, warmup_steps=0)
    ranks_ = 2 if shared == "expert" else 1
    measured = []
    for train in (section(0, 1, lr=1.0), section(zero_stage, ranks_, lr=1.0, **{f"{shared}_parallel": 2})):
        once = packed(SAMPLES, train.ranks, 64)
        outcomes = ranks.run(
            train.processes,
            lambda rank, once=once: once(rank) * 2,
            model_path=reference.path,
            train=train,
            objective=objective,
            critic=critic,
        )
        measured.append(outcomes[0].metrics[1])
    one, two = measured
    assert one.keys() == two.keys() and one["actor/kl_loss"] > 1e-3
    for name in one.keys() - {name for name in one if is_of_layout(name)}:
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
