"""Law 4 for the objective alone: packing, padding and microbatches do not matter, for any row of any table.

And what holds of every loss: its gradient is the slope of its value, with the parts that are stopped held still.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsys.algo import ADVANTAGES, AGGREGATIONS, CORRECTIONS, KL_ESTIMATORS, POLICY_LOSSES, VALUE_LOSSES
from rlsys.algo.measures import Measure, merge
from rlsys.algo.objective import ObjectiveSum, objective_count, objective_statistics, policy_objective, settle_rows
from rlsys.algo.rows import call_row, call_whole, collect, settle
from rlsys.algo.segments import Segments

SEEDS = st.integers(0, 2**32 - 1)
NEEDED = {"seq_mean_token_sum_norm": {"max_tokens": 7}, "constant": {"tokens": 11}}
PER_TOKEN = (
    "policy_logprobs_T",
    "proximal_logprobs_T",
    "behaviour_logprobs_T",
    "ref_logprobs_T",
    "entropy_T",
    "advantages_T",
    "token_draws_T",
    "correct_T",
    "mask_T",
    "on_policy_mask_T",
)

# Parameters at which the random cases below meet every branch of the row.
LOSS_PARAMETERS: dict[str, dict[str, Any]] = {
    "gspo": {"eps_low": 0.1, "eps_high": 0.1},
    "gspo_token": {"eps_low": 0.1, "eps_high": 0.1},
    "cispo": {"eps_low": 0.3, "eps_high": 0.3},
    "opsm_clip": {"delta": 0.05},
    "clip_cov": {"share": 0.2, "cov_low": -0.2, "cov_high": 2.0},
    "kl_cov": {"share": 0.2},
}
CORRECTION_PARAMETERS: dict[str, dict[str, Any]] = {
    "importance": {"level": "turn", "mode": "clip", "low": 0.7, "high": 1.4},
    "icepop": {"low": 0.8, "high": 1.4},
    "kpop": {"limit": 0.02},
    "normalised_tis": {"level": "sequence"},
    "reject_k1": {"low": 0.9, "high": 1.2},
    "reject_k2": {"over": "max", "high": 0.2},
    "reject_k3": {"over": "sum", "high": 0.3},
    "reject_binary_kl": {"high": 0.02},
    "veto": {"low": 0.6, "high": 1.8},
}


@dataclass(frozen=True)
class OneSequence:
    """One sequence: its columns by name, and how many weighted tokens its prompt has in the batch."""

    columns: dict[str, Tensor]
    prompt_tokens: float


def random_batch(seed: int) -> list[OneSequence]:
    """Two to six sequences of one to six tokens; the policies differ by up to a factor of about two."""
    rng = np.random.default_rng(seed)
    batch = []
    lengths = rng.integers(1, 7, size=rng.integers(2, 7))
    for length in lengths:
        columns = {
            "policy_logprobs_T": rng.normal(-1.5, 0.4, length),
            "entropy_T": rng.uniform(0, 2, length),
            "advantages_T": np.full(length, rng.normal()) + 0.1 * rng.normal(size=length),
            "token_draws_T": rng.random(length),
            "correct_T": np.full(length, rng.random() < 0.5),
            "mask_T": rng.random(length) < 0.8,
            "on_policy_mask_T": rng.random(length) < 0.5,
        }
        for name in ("proximal", "behaviour", "ref"):
            columns[f"{name}_logprobs_T"] = columns["policy_logprobs_T"] + rng.normal(0, 0.35, length)
        batch.append({name: torch.from_numpy(np.asarray(column)) for name, column in columns.items()})
    prompts = rng.integers(0, 2, size=len(batch))
    tokens = [sum(int(b["mask_T"].sum()) for b, q in zip(batch, prompts, strict=True) if q == p) for p in prompts]
    return [OneSequence(columns, float(n)) for columns, n in zip(batch, tokens, strict=True)]


def packed(sequences: Sequence[OneSequence], padding: int) -> dict[str, Any]:
    """One microbatch: the sequences one behind the other, and padding with garbage on it, in the last sequence."""
    inputs: dict[str, Any] = {}
    for name in PER_TOKEN:
        own = [sequence.columns[name] for sequence in sequences]
        garbage = (
            torch.zeros(padding, dtype=torch.bool) if own[0].dtype == torch.bool else torch.full((padding,), np.nan)
        )
        inputs[name] = torch.cat([*own, garbage.to(own[0].dtype)])
    lengths = torch.tensor([len(sequence.columns["mask_T"]) for sequence in sequences])
    inputs["segments"] = Segments(lengths.cumsum(0) - lengths, int(lengths.sum()) + padding)
    inputs["prompt_tokens_S"] = torch.tensor([sequence.prompt_tokens for sequence in sequences])
    return inputs


@dataclass
class Step:
    """A step's loss, count and metrics, and its gradient by sequence."""

    loss: float
    count: float
    measures: dict[str, Measure]
    gradients: dict[int, Tensor]


def step(
    batch: Sequence[OneSequence], cut: Sequence[Sequence[int]], padding: Sequence[int], rows: dict[str, Any]
) -> Step:
    """What a learner does with the microbatches ``cut`` (indices of sequences): pre-passes, count, then the pass."""
    whole = [packed([batch[i] for i in part], pad) for part, pad in zip(cut, padding, strict=True)]
    settling = {name: rows[name] for name in ("loss", "correction", "rejections", "anchor") if name in rows}
    statistics = [objective_statistics(**settling, **inputs) for inputs in whole]
    added = functools.reduce(lambda a, b: a.plus(b), statistics)
    settled = settle_rows(loss=rows["loss"], correction=rows["correction"], statistics=added)
    counting = {name: rows[name] for name in ("correction", "rejections", "aggregation") if name in rows}
    counts = [objective_count(**counting, **inputs) for inputs in whole]
    count = 1.0 if counts[0] is None else sum(float(c) for c in counts if c is not None)
    result = Step(0.0, count, {}, {})
    for part, inputs in zip(cut, whole, strict=True):
        policy = inputs["policy_logprobs_T"].requires_grad_()
        done: ObjectiveSum = policy_objective(**rows, **inputs, settled=settled)
        done.loss_sum.backward()
        assert policy.grad is not None and policy.grad.isfinite().all()
        result.loss += done.loss_sum.item() / max(count, 1e-9)
        result.measures = merge(result.measures, done.measures)
        starts = inputs["segments"].starts_S.tolist()
        for index, start in zip(part, starts, strict=True):
            length = len(batch[index].columns["mask_T"])
            result.gradients[index] = policy.grad[start : start + length] / max(count, 1e-9)
    return result


def check_that_packing_does_not_matter(seed: int, rows: dict[str, Any]) -> None:
    batch = random_batch(seed)
    rng = np.random.default_rng(seed + 1)
    order = rng.permutation(len(batch)).tolist()
    edges = sorted({0, len(batch), *rng.integers(0, len(batch) + 1, size=2).tolist()})
    cut = [order[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    together = step(batch, [list(range(len(batch)))], [0], rows)
    apart = step(batch, cut, rng.integers(0, 4, size=len(cut)).tolist(), rows)
    assert apart.loss == pytest.approx(together.loss, rel=1e-6, abs=1e-9)
    assert apart.count == pytest.approx(together.count, rel=1e-6)
    for index, gradient in together.gradients.items():
        torch.testing.assert_close(apart.gradients[index], gradient, rtol=1e-6, atol=1e-9)
    assert together.measures.keys() == apart.measures.keys()
    for name, measure in together.measures.items():
        value = measure.value()
        wanted = None if value is None else pytest.approx(value, rel=1e-6, abs=1e-6)
        assert apart.measures[name].value() == wanted, name


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_no_loss_depends_on_packing(name, seed):
    loss = functools.partial(POLICY_LOSSES[name], **LOSS_PARAMETERS.get(name, {}))
    check_that_packing_does_not_matter(seed, {"loss": loss, "correction": CORRECTIONS["tis"]})


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_no_correction_depends_on_packing(name, seed):
    correction = functools.partial(CORRECTIONS[name], **CORRECTION_PARAMETERS.get(name, {}))
    check_that_packing_does_not_matter(seed, {"loss": POLICY_LOSSES["ppo_clip"], "correction": correction})


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_no_aggregation_depends_on_packing_beside_a_rejection_and_the_other_terms(name, seed):
    rows = {
        "loss": POLICY_LOSSES["gspo"],
        "correction": CORRECTIONS["tis"],
        "rejections": (functools.partial(CORRECTIONS["reject_k1"], over="token", low=0.8, high=1.3),),
        "anchor": "behaviour",
        "aggregation": functools.partial(AGGREGATIONS[name], **NEEDED.get(name, {})),
        "kl": KL_ESTIMATORS["k3_corrected"],
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
    }
    check_that_packing_does_not_matter(seed, rows)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_decoupled_is_plain_where_behaviour_is_proximal(name, seed):
    """At staleness 0 and without mismatch: weights of 1, and either anchor."""
    inputs = packed(random_batch(seed), padding=2)
    inputs["behaviour_logprobs_T"] = inputs["proximal_logprobs_T"]
    loss = functools.partial(POLICY_LOSSES[name], **LOSS_PARAMETERS.get(name, {}))
    plain, *others = (
        whole_objective(inputs, {"loss": loss, "correction": CORRECTIONS[correction], "anchor": anchor})
        for correction, anchor in (("none", "proximal"), ("tis", "proximal"), ("mis", "behaviour"))
    )
    for other in others:
        assert torch.equal(other, plain)


def whole_objective(inputs: dict[str, Any], rows: dict[str, Any]) -> Tensor:
    statistics = objective_statistics(**rows, **inputs)
    settled = settle_rows(loss=rows["loss"], correction=rows["correction"], statistics=statistics)
    return policy_objective(**rows, **inputs, settled=settled).loss_sum


# --- advantages

GROUPED = sorted(set(ADVANTAGES) - {"reinforce_pp", "remax", "gae", "turn_grpo", "gigpo"})


@pytest.mark.parametrize("name", GROUPED)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_advantages_of_a_group_do_not_depend_on_its_neighbours_nor_on_its_order(name, seed):
    """Groups of the batch, and their members, in another order; batch scope through its pre-pass, in parts."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=rng.integers(2, 5)).tolist()
    groups = [
        {
            "rewards_S": torch.from_numpy(rng.integers(0, 4, n) / 3),
            "lengths_S": torch.from_numpy(rng.integers(0, 9, n).astype(float)),
            "reward_parts_SK": torch.from_numpy(rng.random((n, 2))),
        }
        for n in sizes
    ]

    def joined(chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        inputs = {key: torch.cat([group[key] for group in chosen]) for key in chosen[0]}
        counts = torch.tensor([len(group["rewards_S"]) for group in chosen])
        return {**inputs, "group_starts_G": counts.cumsum(0) - counts}

    together = call_whole(ADVANTAGES[name], joined(groups)).split(sizes)
    order = rng.permutation(len(groups)).tolist()
    within = [torch.from_numpy(rng.permutation(n)) for n in sizes]
    moved = [{key: value[within[i]] for key, value in groups[i].items()} for i in order]
    parts = [collect(ADVANTAGES[name], joined([group])) for group in moved]
    added = None if parts[0] is None else functools.reduce(lambda a, b: a.plus(b), parts)
    apart = call_row(ADVANTAGES[name], joined(moved), settle(ADVANTAGES[name], added))
    for index, advantages in zip(order, apart.split([sizes[i] for i in order]), strict=True):
        torch.testing.assert_close(advantages, together[index][within[index]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["reinforce_pp", "remax", "gae"])
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_advantages_of_tokens_do_not_depend_on_packing(name, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, size=4).tolist()
    sequences = [
        {
            "rewards_T": torch.from_numpy(rng.normal(size=n)),
            "values_T": torch.from_numpy(rng.normal(size=n)),
            "mask_T": torch.from_numpy(rng.random(n) < 0.7),
            "greedy_rewards_S": torch.from_numpy(rng.normal(size=1)),
        }
        for n in lengths
    ]

    def joined(chosen: list[dict[str, Tensor]]) -> dict[str, Any]:
        counts = torch.tensor([len(sequence["mask_T"]) for sequence in chosen])
        inputs: dict[str, Any] = {key: torch.cat([sequence[key] for sequence in chosen]) for key in chosen[0]}
        return {**inputs, "segments": Segments(counts.cumsum(0) - counts, int(counts.sum()))}

    bound = functools.partial(ADVANTAGES[name], **({} if name == "remax" else {"gamma": 0.9}))
    together = call_whole(bound, joined(sequences))
    parts = [collect(bound, joined([sequence])) for sequence in sequences]
    added = None if parts[0] is None else functools.reduce(lambda a, b: a.plus(b), parts)
    settled = settle(bound, added)
    alone = [call_row(bound, joined([sequence]), settled) for sequence in sequences]
    for field in ("advantages_T", "returns_T"):
        torch.testing.assert_close(torch.cat([getattr(a, field) for a in alone]), getattr(together, field))


# --- gradients


@contextmanager
def stopped_parts_held(memory: list[Tensor], replay: bool) -> Iterator[None]:
    """Within it ``detach`` remembers what it is given, or, on replay, gives what it remembered in the same order."""
    original: Callable[[Tensor], Tensor] = Tensor.detach
    remembered = iter(memory)

    def detach(tensor: Tensor) -> Tensor:
        if replay:
            return next(remembered)
        memory.append(original(tensor).clone())
        return memory[-1]

    Tensor.detach = detach  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.detach = original  # type: ignore[method-assign, assignment]


def check_gradient(value: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Gradient against central differences, with every stopped part as it was at ``at``."""
    memory: list[Tensor] = []
    variable = at.clone().requires_grad_()
    with stopped_parts_held(memory, replay=False):
        total = value(variable)
    (gradient,) = torch.autograd.grad(total, variable)
    width = 1e-6
    for index in range(at.numel()):
        ends = []
        for sign in (1.0, -1.0):
            moved = at.clone()
            moved[index] += sign * width
            with stopped_parts_held(memory, replay=True):
                ends.append(value(moved).item())
        slope = (ends[0] - ends[1]) / (2 * width)
        assert gradient[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-7), index


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_the_gradient_of_a_loss_is_its_slope(name, seed):
    inputs = packed(random_batch(seed), padding=0)
    inputs["anchor_logprobs_T"] = inputs["proximal_logprobs_T"]
    loss = functools.partial(POLICY_LOSSES[name], **LOSS_PARAMETERS.get(name, {}))
    settled = settle(loss, collect(loss, inputs))

    def value(policy: Tensor) -> Tensor:
        return call_row(loss, {**inputs, "policy_logprobs_T": policy}, settled).loss_T.sum()

    check_gradient(value, inputs["policy_logprobs_T"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(set(KL_ESTIMATORS) - {"k3_straight"}))
def test_the_gradient_of_a_divergence_is_its_slope(name, seed):
    inputs = packed(random_batch(seed), padding=0)
    check_gradient(
        lambda policy: call_row(KL_ESTIMATORS[name], {**inputs, "policy_logprobs_T": policy}).sum(),
        inputs["policy_logprobs_T"],
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(VALUE_LOSSES))
def test_the_gradient_of_a_value_loss_is_its_slope(name, seed):
    columns = packed(random_batch(seed), padding=0)
    inputs = {
        "old_values_T": columns["proximal_logprobs_T"],
        "returns_T": columns["behaviour_logprobs_T"],
        "mask_T": columns["mask_T"],
    }
    check_gradient(
        lambda values: call_row(VALUE_LOSSES[name], {**inputs, "values_T": values}).loss_T.sum(),
        columns["policy_logprobs_T"],
    )
