"""Law 4: a step's gradient depends on the samples alone; and what else a learner rank promises.

The reference is plain transformers, one sequence at a time, with its own GRPO, truncated weights and PPO loss.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from rlsys.algo import AGGREGATIONS, CORRECTIONS, POLICY_LOSSES
from rlsys.algo.advantages import grpo
from rlsys.algo.losses import TokenLosses, ppo_clip
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.batch.tensors import Microbatch, RankBatch, RankPart
from rlsys.records import RolloutGroup, Sample, Version
from rlsys.train.objective import Objective
from tests.laws.learner_ranks import OBJECTIVE, TEMPERATURE, Outcome, is_time, make_groups, section

pytestmark = pytest.mark.engines

VERSION = Version(incarnation=0, step=7)
OLDEST_STEP = 6  # one step back: tokens of step 5 lose their weight
EXACT = 1e-5
SAMPLES = ("keys_S", "prompt_tokens_S", "greedy_rewards_S", "correct_S")  # one for each sample of a microbatch


@pytest.fixture(scope="module")
def groups() -> list[RolloutGroup]:
    return make_groups(VERSION)


@pytest.fixture(scope="module")
def samples(groups: list[RolloutGroup]) -> list[Sample]:
    return build(groups, advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0)


def load(model_path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


def reference_terms(group: RolloutGroup) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """For each rollout: tokens, behaviour logprobs and mask of all but the first token, and its advantage."""
    rewards = np.array(group.baseline_rewards)
    for rollout in group.rollouts:
        advantage = (rollout.reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        mask = rollout.loss_mask_T & (rollout.versions_T >= OLDEST_STEP)
        yield (
            torch.tensor(rollout.token_ids_T).long(),
            torch.tensor(rollout.behaviour_logprobs_T[1:]),
            torch.tensor(mask[1:]),
            float(advantage),
        )


def reference_logprobs(model: torch.nn.Module, token_ids: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = model(token_ids[None]).logits[0, :-1] / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, token_ids[1:, None]).squeeze(1)


def reference_step(
    model: torch.nn.Module, groups: Sequence[RolloutGroup], anchors: Sequence[torch.Tensor] | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient. ``anchors``: the frozen proximal logprobs, one by one; None takes the model's own."""
    terms = [term for group in groups for term in reference_terms(group)]
    count = sum(int(mask.sum()) for _, _, mask, _ in terms)
    loss = torch.tensor(0.0)
    for index, (token_ids, behaviour, mask, advantage) in enumerate(terms):
        logprobs = reference_logprobs(model, token_ids, TEMPERATURE)
        anchor = logprobs.detach() if anchors is None else anchors[index]
        weight = torch.exp(anchor - behaviour).clamp(max=2.0)
        ratio = torch.exp(logprobs - anchor)
        worse = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        loss = loss + (weight * worse)[mask].sum() / count
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """|got - wanted| / |wanted| over all tensors together; both must name the same tensors."""
    assert got.keys() == wanted.keys()
    difference = sum(float(np.square(got[name].astype(float) - wanted[name]).sum()) for name in wanted)
    return (difference / sum(float(np.square(wanted[name].astype(float)).sum()) for name in wanted)) ** 0.5


def gradient_of(outcome: Outcome, lr: float = 64.0) -> dict[str, np.ndarray]:
    return {name: (outcome.before[name] - outcome.after[name]) / lr for name in outcome.before}


def padded_rows(samples: Sequence[Sample]) -> RankBatch:
    """One microbatch in which every sample has a row of its own, padded to the longest."""
    single = [packed(samples[i : i + 1], 1, 64)(0)[0].parts[0].microbatches[0] for i in range(len(samples))]
    length = max(mb.token_ids.shape[1] for mb in single)

    def stack(name: str) -> torch.Tensor:
        return torch.cat([F.pad(getattr(mb, name), (0, length - mb.token_ids.shape[1])) for mb in single])

    names = ("token_ids", "weight_mask", "behaviour_logprobs", "advantages", "rewards", "on_policy_mask")
    positions = torch.arange(length).repeat(len(single), 1)
    of_samples = {name: torch.cat([getattr(mb, name) for mb in single]) for name in SAMPLES}
    rows = Microbatch(
        **{name: stack(name) for name in names},
        **of_samples,
        position_ids=positions,
        teacher=None,
        segments=tuple(replace(mb.segments[0], sample=i, row=i) for i, mb in enumerate(single)),
    )
    part = RankPart(microbatches=(rows,), num_weighted_tokens=int(rows.weight_mask.sum()))
    return RankBatch(version=VERSION, parts=(part,), num_tokens=0, num_samples=len(samples))


def packed(samples: Sequence[Sample], world_size: int, budget: int, steps: int = 1):
    """For each rank the list of its batches: here one batch."""
    batch = pack(
        samples,
        ranks=world_size,
        steps_per_batch=steps,
        tokens_per_microbatch=budget,
        pad_token_id=3,
        version=VERSION,
    )
    return lambda rank: [batch.for_rank(rank)]


KINDS_OF_ROWS = {
    "sequence loss": Objective(
        loss=POLICY_LOSSES["gspo"], correction=CORRECTIONS["tis"], aggregation=AGGREGATIONS["seq_mean_token_mean"]
    ),
    "batch loss, by chance": Objective(
        loss=partial(POLICY_LOSSES["clip_cov"], share=0.1), correction=CORRECTIONS["tis"]
    ),
    "batch loss": Objective(loss=partial(POLICY_LOSSES["kl_cov"], share=0.1), correction=CORRECTIONS["icepop"]),
    "batch correction": Objective(loss=POLICY_LOSSES["ppo_clip"], correction=CORRECTIONS["normalised_tis"]),
    "rejection": Objective(
        loss=POLICY_LOSSES["cispo"],
        correction=CORRECTIONS["none"],
        rejections=(partial(CORRECTIONS["reject_k2"], high=0.5), CORRECTIONS["veto"]),
        anchor="behaviour",
        aggregation=AGGREGATIONS["seq_mean_token_sum"],
    ),
    "prompts": Objective(
        loss=POLICY_LOSSES["reinforce"], correction=CORRECTIONS["aipo"], aggregation=AGGREGATIONS["prompt_mean"]
    ),
    "a constant": Objective(
        loss=POLICY_LOSSES["reinforce"],
        correction=CORRECTIONS["tis"],
        aggregation=partial(AGGREGATIONS["constant"], tokens=100),
    ),
}


@pytest.mark.parametrize("kind", KINDS_OF_ROWS)
def test_gradient_of_every_kind_of_rows_is_the_same_in_any_layout(ranks, model_path, samples, kind):
    """Two optimizer steps, so that the second one is off its anchor; stages and budgets vary with the ranks."""
    gradients, metrics = [], []
    for world_size, zero_stage, budget in ((1, 0, 4096), (1, 0, 64), (2, 2, 64), (2, 3, 150)):
        outcomes = ranks.run(
            world_size,
            packed(samples, world_size, budget, steps=2),
            model_path=model_path,
            train=section(zero_stage, world_size, lr=1.0, steps_per_batch=2),
            objective=KINDS_OF_ROWS[kind],
        )
        gradients.append(gradient_of(outcomes[0], lr=1.0))
        metrics.append(outcomes[0].metrics[0])
    for gradient, measured in zip(gradients[1:], metrics[1:], strict=True):
        assert relative_difference(gradient, gradients[0]) <= 10 * EXACT
        assert measured["actor/pg_loss"] == pytest.approx(metrics[0]["actor/pg_loss"], rel=1e-3, abs=1e-6)


def test_gradient_does_not_depend_on_rows_shared_or_padded(ranks, model_path, groups, samples):
    _, gradient = reference_step(load(model_path), groups)
    (outcome,) = ranks.run(1, lambda rank: [padded_rows(samples)], model_path=model_path, train=section(0, 1))
    assert relative_difference(gradient_of(outcome), gradient) <= EXACT


def test_rank_without_samples_keeps_step_and_adds_nothing(ranks, model_path, groups):
    one = replace(groups[0], rollouts=groups[0].rollouts[:1])
    _, gradient = reference_step(load(model_path), [one])
    batches = packed(build([one], advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0), 2, 64)
    assert not batches(1)[0].parts[0].microbatches[0].segments
    outcomes = ranks.run(2, batches, model_path=model_path, train=section(3, 2))
    assert relative_difference(gradient_of(outcomes[0]), gradient) <= EXACT


def test_second_step_of_a_batch_is_taken_against_the_policy_before_the_first(ranks, model_path, groups, samples):
    lr = 0.25
    halves = [groups[:2], groups[2:]]
    frozen, moving = load(model_path), load(model_path)
    with torch.no_grad():
        anchors = [
            [reference_logprobs(frozen, token_ids, TEMPERATURE) for g in half for token_ids, *_ in reference_terms(g)]
            for half in halves
        ]
    for half, anchor in zip(halves, anchors, strict=True):
        for model, used in ((frozen, anchor), (moving, None)):
            reference_step(model, half, used)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= lr * parameter.grad
    outcomes = ranks.run(
        2, packed(samples, 2, 64, steps=2), model_path=model_path, train=section(3, 2, lr=lr, steps_per_batch=2)
    )
    start = outcomes[0].before
    change = {name: outcomes[0].after[name] - start[name] for name in start}
    wanted = {name: p.detach().numpy() - start[name] for name, p in frozen.named_parameters()}
    recomputed = {name: p.detach().numpy() - start[name] for name, p in moving.named_parameters()}
    assert relative_difference(change, wanted) <= 10 * EXACT
    assert relative_difference(recomputed, wanted) > 1e-2
    assert outcomes[0].metrics[0]["actor/pg_clipfrac"] > 0.0


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_loss_that_is_not_finite_stops_every_rank_before_the_weights_change(ranks, model_path, samples, zero_stage):
    poisoned = list(samples)
    poisoned[0] = replace(samples[0], advantages_T=np.full_like(samples[0].advantages_T, np.nan))
    outcomes = ranks.run(2, packed(poisoned, 2, 64), model_path=model_path, train=section(zero_stage, 2))
    for outcome in outcomes:
        assert outcome.diverged is not None and outcome.diverged.startswith("the loss is not finite at step 8")
        assert "0.7" in outcome.diverged
    assert all(np.array_equal(outcomes[0].before[name], outcomes[0].after[name]) for name in outcomes[0].before)


def loss_with_poisoned_gradient(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T) -> TokenLosses:
    """Finite, but the root's slope at 0 is infinite, and times 0 not a number."""
    plain = ppo_clip(policy_logprobs_T, anchor_logprobs_T, advantages_T, mask_T)
    return replace(plain, loss_T=plain.loss_T + (policy_logprobs_T * 0.0).sqrt())


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_gradient_that_is_not_finite_stops_every_rank_before_the_weights_change(ranks, model_path, samples, zero_stage):
    outcomes = ranks.run(
        2,
        packed(samples, 2, 64),
        model_path=model_path,
        train=section(zero_stage, 2),
        objective=replace(OBJECTIVE, loss=loss_with_poisoned_gradient),
    )
    for outcome in outcomes:
        assert outcome.diverged is not None and outcome.diverged.startswith("the gradient norm is not finite at step 8")
    assert all(np.array_equal(outcomes[0].before[name], outcomes[0].after[name]) for name in outcomes[0].before)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_export_and_saved_folder_are_the_trained_weights_exactly(ranks, model_path, samples, tmp_path, zero_stage):
    probe = [samples[0].token_ids_T, samples[1].token_ids_T[:5]]
    outcomes = ranks.run(
        2,
        packed(samples, 2, 64),
        model_path=model_path,
        train=section(zero_stage, 2, lr=0.25),
        probe=probe,
        save_to=str(tmp_path),
    )
    initial, saved = load(model_path), load(str(tmp_path))
    assert not outcomes[1].after
    assert "lm_head.weight" not in outcomes[0].after  # the second name of a tied pair
    for name, parameter in initial.named_parameters():
        assert np.array_equal(outcomes[0].before[name], parameter.detach().numpy())
    for name, parameter in saved.named_parameters():
        assert np.array_equal(outcomes[0].after[name], parameter.detach().numpy())
        assert not np.array_equal(outcomes[0].after[name], outcomes[0].before[name])
    for outcome in outcomes:
        for ids, logprobs in zip(probe, outcome.probe, strict=True):
            with torch.no_grad():
                wanted = reference_logprobs(saved, torch.tensor(ids).long(), 1.0).numpy()
            assert logprobs[0] == 0.0 and logprobs.dtype == np.float32
            np.testing.assert_allclose(logprobs[1:], wanted, atol=2e-5)


def test_learning_rate_follows_its_schedule_and_metrics_are_equal_on_every_rank(ranks, model_path, samples):
    train = section(2, 2, lr=0.5, warmup_steps=2, schedule={"name": "linear", "floor": 0.5})
    once = packed(samples, 2, 64)
    outcomes = ranks.run(2, lambda rank: once(rank) * 5, model_path=model_path, train=train, batches_of_run=4)
    assert [metrics["actor/lr"] for metrics in outcomes[0].metrics] == [0.25, 0.5, 0.5, 0.375, 0.25]
    for first, second in zip(outcomes[0].metrics, outcomes[1].metrics, strict=True):
        assert {name: value for name, value in first.items() if not is_time(name)} == {
            name: value for name, value in second.items() if not is_time(name)
        }
    gap = functools.partial(first_gap, load(model_path), samples)
    metrics = outcomes[0].metrics[0]
    assert metrics["rollout_corr/logprob_abs_diff_mean"] == pytest.approx(gap(oldest=OLDEST_STEP), rel=1e-5)
    assert metrics["rollout_corr/on_policy_logprob_abs_diff_mean"] == pytest.approx(gap(oldest=VERSION.step), rel=1e-5)
    lengths = [len(sample.token_ids_T) for sample in samples]
    assert metrics["perf/train_tokens"] == sum(lengths)
    # 81,920 weights that multiply; 2 layers of 4 heads of 16
    assert metrics["perf/train_flops"] == 6 * 81_920 * sum(lengths) + 12 * 128 * sum(n * n for n in lengths)
    assert 0.0 < metrics["perf/mfu"] < 1.0
    assert metrics["actor/grad_norm_spike"] == 1.0 and metrics["actor/loss_spikes"] == 0.0


def first_gap(model: torch.nn.Module, samples: Sequence[Sample], oldest: int) -> float:
    """Mean |learner - engine| of the log-probabilities of tokens sampled at ``oldest`` or later."""
    gaps = []
    for sample in samples:
        with torch.no_grad():
            own = reference_logprobs(model, torch.tensor(sample.token_ids_T).long(), TEMPERATURE).numpy()
        chosen = sample.weight_mask_T[1:] & (sample.versions_T[1:] >= oldest)
        gaps.append(np.abs(own - sample.behaviour_logprobs_T[1:])[chosen])
    return float(np.concatenate(gaps).mean())
