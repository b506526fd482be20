"""What the models around the policy say and learn: critic, reference, teacher. And law 4 for the objectives that they
take part in.

The references are plain transformers, one sequence at a time, with their own formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from rlsys.algo import ADVANTAGES, CORRECTIONS, KL_ESTIMATORS, POLICY_LOSSES, VALUE_LOSSES
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.records import Sample, TeacherScores, Version
from rlsys.train.critic import CriticPlan
from rlsys.train.objective import Divergence, Objective, Teaching
from rlsys.train.terms import Term
from rlsys.weights.tcp import free_port
from tests.laws.learner_ranks import TEMPERATURE, VOCABULARY, Outcome, Ranks, is_time, make_groups, section

pytestmark = pytest.mark.engines

VERSION = Version(incarnation=0, step=7)
EXACT = 1e-5
MEASURED = {"actor/pg_loss", "actor/kl_loss", "critic/vf_loss", "critic/kl", "teacher/reverse_kl"}
PLAIN = Objective(loss=POLICY_LOSSES["reinforce"], correction=CORRECTIONS["none"])
# data-parallel ranks, ZeRO stage, token budget, processes of tensor parallel
LAYOUTS = ((1, 0, 4096, 1), (1, 0, 64, 1), (2, 3, 150, 1))
CUT = ((1, 0, 64, 2), (1, 3, 150, 2))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """With a teacher's scores: random log-probabilities of the tokens, and of three random candidates."""
    rng = np.random.default_rng(1)
    built = build(make_groups(VERSION), advantage=ADVANTAGES["grpo"], oldest_step=None, correct_at=1.0)
    return [replace(sample, teacher=teacher_scores(len(sample.token_ids_T), rng)) for sample in built]


def teacher_scores(length: int, rng: np.random.Generator) -> TeacherScores:
    return TeacherScores(
        logprobs_T=rng.normal(-5.0, 1.0, length).astype(np.float32),
        candidate_ids_TK=np.stack([rng.permutation(VOCABULARY)[:3] for _ in range(length)]).astype(np.int32),
        candidate_logprobs_TK=np.log(rng.dirichlet([2, 2, 2, 4], length)[:, :3]).astype(np.float32),
    )


def run(
    ranks: Ranks,
    model_path: str,
    samples: Sequence[Sample],
    layout: tuple[int, int, int, int],
    objective: Objective,
    *,
    critic: CriticPlan | None = None,
    batches: int = 1,
    steps: int = 1,
    lr: float = 1.0,
    section_keys: dict[str, Any] | None = None,
    **keys,
) -> Outcome:
    """Rank 0's outcome of the same batch trained ``batches`` times, one version after another."""
    num_ranks, zero_stage, budget, parts = layout
    packed = [
        pack(
            samples,
            ranks=num_ranks,
            steps_per_batch=steps,
            tokens_per_microbatch=budget,
            pad_token_id=3,
            version=Version(incarnation=0, step=VERSION.step + index),
        )
        for index in range(batches)
    ]
    keys_of_section = {"lr": lr, "steps_per_batch": steps, "tensor_parallel": parts, **(section_keys or {})}
    outcomes = ranks.run(
        num_ranks * parts,
        lambda rank: [batch.for_rank(rank) for batch in packed],
        model_path=model_path,
        train=section(zero_stage, num_ranks, **keys_of_section),
        objective=objective,
        critic=critic,
        **keys,
    )
    assert outcomes[0].diverged is None
    return outcomes[0]


def difference(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """|got - wanted| / |wanted| over all tensors together; both must name the same tensors."""
    assert got.keys() == wanted.keys()
    square = sum(float(np.square(got[name].astype(float) - wanted[name]).sum()) for name in wanted)
    return (square / sum(float(np.square(wanted[name].astype(float)).sum()) for name in wanted)) ** 0.5


def change(outcome: Outcome) -> dict[str, np.ndarray]:
    return {name: outcome.after[name] - outcome.before[name] for name in outcome.before}


def critic_plan(model_path: str, *, lr: float = 0.05, warmup_steps: int = 0) -> CriticPlan:
    return CriticPlan(model_path=model_path, loss=VALUE_LOSSES["squared_error"], lr=lr, warmup_steps=warmup_steps)


def kl(name: str, place: Literal["loss", "reward"], coef: float = 0.5) -> Divergence:
    return Divergence(estimator=KL_ESTIMATORS[name], term=Term(coef=coef), place=place)


PPO = replace(PLAIN, advantage=partial(ADVANTAGES["gae"], lam=0.9), loss=POLICY_LOSSES["ppo_clip"])
KINDS = {
    "critic": PPO,
    "kl in the loss, and entropy": replace(PLAIN, kl=kl("k3", "loss"), entropy=Term(coef=0.1)),
    "kl in the reward": replace(PLAIN, advantage=ADVANTAGES["reinforce_pp"], kl=kl("k1", "reward")),
    "greedy baseline": replace(PLAIN, advantage=ADVANTAGES["remax"]),
    "teacher by sample": replace(PLAIN, teaching=Teaching(top_k=0, coef=0.3, with_reward=True)),
    "teacher over candidates": replace(PLAIN, teaching=Teaching(top_k=3, coef=0.3, with_reward=False)),
    "right answers": replace(PLAIN, loss=POLICY_LOSSES["vapo_clip"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_same_in_any_layout(ranks, model_path, samples, kind):
    """Two batches of two steps: the second one sees a critic that has learnt, and a policy away from its reference."""
    critic = critic_plan(model_path) if kind == "critic" else None
    outcomes = [
        run(ranks, model_path, samples, layout, KINDS[kind], critic=critic, batches=2, steps=2)
        for layout in (*LAYOUTS, CUT[1])
    ]
    first = change(outcomes[0])
    for outcome in outcomes[1:]:
        assert difference(change(outcome), first) <= 10 * EXACT
        for mine, theirs in zip(outcome.metrics, outcomes[0].metrics, strict=True):
            assert mine.keys() == theirs.keys()
            for name in MEASURED & mine.keys():
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("lora", [{"r": 4}, {"r": 2, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}])
def test_adapters_learn_the_same_in_any_layout_and_leave_as_whole_weights(ranks, model_path, samples, tmp_path, lora):
    """With their base as reference. What is exported, saved and probed is one model, and nothing else of it moved."""
    objective = replace(PLAIN, kl=kl("k3", "loss"))
    probe = [samples[0].token_ids_T]
    outcomes = [
        run(
            ranks,
            model_path,
            samples,
            layout,
            objective,
            batches=2,
            lr=8.0,
            section_keys={"lora": lora},
            probe=probe,
            save_to=str(tmp_path / f"{number}"),
        )
        for number, layout in enumerate(LAYOUTS)
    ]
    last = len(LAYOUTS) - 1  # under ZeRO-3
    moved = change(outcomes[0])
    for outcome in outcomes[1:]:
        assert difference(change(outcome), moved) <= 20 * EXACT
    assert outcomes[0].metrics[0]["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert outcomes[0].metrics[1]["actor/kl_loss"] > 1e-6
    layers = ("q_proj", "down_proj") if "target_modules" in lora else ("_proj",)
    initial = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for name, parameter in initial.named_parameters():
        assert np.array_equal(outcomes[0].before[name], parameter.detach().numpy())
        assert np.any(moved[name] != 0.0) == (name.endswith("weight") and any(layer in name for layer in layers)), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"{last}", dtype=torch.float32)
    with torch.no_grad():
        ids = torch.tensor(probe[0]).long()
        logprobs = torch.log_softmax(saved(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        adapted = PeftModel.from_pretrained(initial, tmp_path / f"{last}-adapter")
        by_peft = torch.log_softmax(adapted(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    np.testing.assert_allclose(outcomes[last].probe[0][1:], logprobs.numpy(), atol=2e-5)
    np.testing.assert_allclose(outcomes[last].probe[0][1:], by_peft.numpy(), atol=2e-5)


# --- critic


def returns_and_advantages(rewards: list[float], values: list[float], lam: float) -> tuple[list[float], list[float]]:
    """GAE without discount, token by token from behind."""
    advantages, following, after = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        following = reward + after - value + lam * following
        advantages.append(following)
        after = value
    advantages.reverse()
    return [a + v for a, v in zip(advantages, values, strict=True)], advantages


def test_ppo_is_gae_and_two_losses(ranks, model_path, samples):
    """Two batches against a plain loop: the critic says 0, learns one step, and its values shape the second batch."""
    lam, lr, critic_lr = 0.9, 0.5, 0.05
    policy = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    value_model = AutoModelForTokenClassification.from_pretrained(model_path, num_labels=1, dtype=torch.float32)
    torch.nn.init.zeros_(value_model.score.weight), torch.nn.init.zeros_(value_model.score.bias)
    count = sum(int(sample.weight_mask_T.sum()) for sample in samples)
    value_losses = []
    for _ in range(2):
        terms, value_loss = [], torch.tensor(0.0)
        for sample in samples:
            ids, mask = torch.tensor(sample.token_ids_T).long()[None], torch.tensor(sample.weight_mask_T)
            values = value_model(ids).logits[0, :-1, 0][mask[1:]]  # before each weighted token
            rewards = [0.0] * (len(values) - 1) + [float(sample.rewards_T.sum())]
            returns, advantages = returns_and_advantages(rewards, values.tolist(), lam)
            value_loss = value_loss + 0.5 * (values - torch.tensor(returns)).square().sum() / count
            logprobs = torch.log_softmax(policy(ids).logits[0, :-1] / TEMPERATURE, -1)
            terms.append((logprobs.gather(1, ids[0, 1:, None])[mask[1:], 0], torch.tensor(advantages)))
        everything = torch.cat([advantages for _, advantages in terms])
        mean, std = everything.mean(), (everything.var(unbiased=True) + 1e-8).sqrt()
        loss = sum(-(((a - mean) / std) * torch.exp(p - p.detach())).sum() for p, a in terms) / count
        for model, objective, rate in ((policy, loss, lr), (value_model, value_loss, critic_lr)):
            model.zero_grad()
            objective.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= rate * parameter.grad
        value_losses.append(value_loss.item())
    objective = replace(PPO, advantage=partial(ADVANTAGES["gae"], lam=lam))
    outcome = run(
        ranks,
        model_path,
        samples,
        (2, 2, 64, 1),
        objective,
        critic=critic_plan(model_path, lr=critic_lr),
        batches=2,
        lr=lr,
    )
    assert [metrics["critic/vf_loss"] for metrics in outcome.metrics] == pytest.approx(value_losses, rel=1e-4)
    assert value_losses[1] < value_losses[0]
    wanted = {name: p.detach().numpy() - outcome.before[name] for name, p in policy.named_parameters()}
    assert difference(change(outcome), wanted) <= 10 * EXACT


def test_the_critic_learns_alone_while_it_warms_up(ranks, model_path, samples):
    plan = critic_plan(model_path, warmup_steps=VERSION.step + 1)  # the first of the two batches
    outcome = run(ranks, model_path, samples, (1, 0, 4096, 1), PPO, critic=plan)
    assert all(np.array_equal(outcome.before[name], outcome.after[name]) for name in outcome.before)
    both = run(ranks, model_path, samples, (1, 0, 4096, 1), PPO, critic=plan, batches=2)
    first, second = both.metrics
    assert "actor/grad_norm" not in first and second["actor/grad_norm"] > 0.0
    assert second["critic/vf_loss"] < first["critic/vf_loss"]


# --- reference


def test_divergence_from_the_reference_is_nothing_until_the_policy_moves(ranks, model_path, samples):
    objective = replace(PLAIN, kl=kl("k3", "loss", coef=0.1))
    outcome = run(ranks, model_path, samples, (2, 3, 64, 1), objective, batches=3)
    first, second, third = (metrics["actor/kl_loss"] for metrics in outcome.metrics)
    assert first == pytest.approx(0.0, abs=1e-6) and second > 1e-3 and third > 1e-3
    assert [metrics["actor/kl_coef"] for metrics in outcome.metrics] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("layout", [(2, 0, 64, 1), (2, 3, 64, 1), *CUT])
def test_a_refreshed_reference_is_the_policy_again(ranks, model_path, samples, layout):
    divergence = replace(kl("k3", "loss"), refresh_steps=2)  # after steps 8 and 10: before the second and fourth batch
    outcome = run(ranks, model_path, samples, layout, replace(PLAIN, kl=divergence), batches=4)
    values = [metrics["actor/kl_loss"] for metrics in outcome.metrics]
    assert values[1] == pytest.approx(0.0, abs=1e-6) and values[3] == pytest.approx(0.0, abs=1e-6)
    assert values[2] > 1e-3


def test_the_weight_of_the_divergence_moves_towards_its_target(ranks, model_path, samples):
    from rlsys.algo import COEFFICIENTS

    control = partial(COEFFICIENTS["adaptive_kl"], target=1e-3, horizon=float(len(samples)))
    divergence = Divergence(estimator=KL_ESTIMATORS["k2"], term=Term(coef=0.1, control=control))
    outcome = run(ranks, model_path, samples, (1, 0, 4096, 1), replace(PLAIN, kl=divergence), batches=3)
    # nothing to measure in the first batch, so a fifth off; far too much in the second, so a fifth more
    coefs = [metrics["actor/kl_coef"] for metrics in outcome.metrics]
    assert coefs == pytest.approx([0.1, 0.08, 0.096])


# --- teacher


def test_a_teacher_alone_pulls_the_policy_to_its_candidates(ranks, model_path, samples):
    objective = replace(PLAIN, teaching=Teaching(top_k=3, coef=1.0, with_reward=False))
    outcome = run(ranks, model_path, samples, (1, 0, 4096, 1), objective, batches=6, lr=0.2)
    divergences = [metrics["teacher/reverse_kl"] for metrics in outcome.metrics]
    assert all(later < earlier for earlier, later in zip(divergences[:-1], divergences[1:], strict=True))
    assert outcome.metrics[0]["actor/pg_loss"] == 0.0


def test_a_teachers_word_on_sampled_tokens_is_taken_off_the_advantages(ranks, model_path, samples):
    teaching = Teaching(top_k=0, coef=0.5, with_reward=True)
    outcome = run(ranks, model_path, samples, (2, 0, 64, 1), replace(PLAIN, teaching=teaching))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    advantages = []
    for sample in samples:
        ids, mask = torch.tensor(sample.token_ids_T).long(), sample.weight_mask_T
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1] / TEMPERATURE, -1).gather(1, ids[1:, None])[
                :, 0
            ]
        log_ratio = logprobs.numpy()[mask[1:]] - sample.teacher.logprobs_T[mask]
        advantages.append(sample.advantages_T[mask] - 0.5 * log_ratio)
    everything = np.concatenate(advantages)
    (metrics,) = outcome.metrics
    assert metrics["critic/advantages/mean"] == pytest.approx(everything.mean(), rel=1e-4)
    assert metrics["critic/advantages/max"] == pytest.approx(everything.max(), rel=1e-4)


# --- resume


@pytest.mark.parametrize(
    ("zero_stage", "then", "lora"),
    [(0, 0, None), (3, 3, None), (2, 2, {"r": 2}), (0, 3, None), (3, 1, None), (2, 3, {"r": 2}), (3, 0, {"r": 2})],
)
def test_everything_around_the_policy_goes_on_where_it_was_saved(
    model_path, samples, tmp_path: Path, zero_stage, then, lora
):
    """Three batches in one life, and one, then two in another, under the ZeRO stage ``then``: the same, to the last bit
    where that has not changed."""
    from rlsys.algo import COEFFICIENTS
    from rlsys.train.learner import LearnerRank
    from rlsys.train.resume import convert

    control = partial(COEFFICIENTS["adaptive_kl"], target=1e-3, horizon=float(len(samples)))
    divergence = Divergence(
        estimator=KL_ESTIMATORS["k1"],
        term=Term(coef=0.1, control=control),
        place="reward",
        refresh_steps=0 if lora else VERSION.step + 1,
    )
    objective = replace(PPO, kl=divergence)
    packed = [
        pack(
            samples,
            ranks=1,
            steps_per_batch=2,
            tokens_per_microbatch=128,
            pad_token_id=3,
            version=Version(incarnation=0, step=VERSION.step + index),
        ).for_rank(0)
        for index in range(3)
    ]

    def life(stage: int, first: int, checkpoint: str | None, save_after: int | None) -> list[dict[str, float]]:
        learner = LearnerRank(
            model_path=model_path,
            train=section(stage, 1, lr=1e-3, optimizer={"name": "adamw"}, lora=lora),
            temperature=1.0,
            objective=objective,
            critic=critic_plan(model_path, lr=1e-3),
            seed=0,
            threads=1,
        )
        metrics = []
        try:
            learner.start(0, 1, "127.0.0.1", free_port(), checkpoint)
            for index in range(first, 3):
                metrics.append(learner.step(packed[index]))
                if index == save_after:
                    learner.save_checkpoint(str(tmp_path / "saved"))
                    written = learner.checkpoint_written(60.0)
                    assert written is not None and written.failure == ""
        finally:
            learner.stop()
        return [{k: v for k, v in own.items() if not is_time(k)} for own in metrics]

    whole = life(zero_stage, 0, None, save_after=0)
    saved = tmp_path / "saved"
    if then != zero_stage:
        convert(saved, tmp_path / "converted", timeout_s=120.0)
        saved = tmp_path / "converted"
    for mine, theirs in zip(life(then, 1, str(saved), None), whole[1:], strict=True):
        assert mine == (theirs if then == zero_stage else pytest.approx(theirs, abs=1e-5, rel=1e-4))
    assert whole[2]["actor/kl_coef"] != whole[0]["actor/kl_coef"]
