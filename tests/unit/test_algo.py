"""Measures, aggregations, coefficients, and the tables as a whole."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping

import pytest
import torch

import rlsys.algo
from rlsys.algo import (
    ADVANTAGES,
    AGGREGATIONS,
    COEFFICIENTS,
    CORRECTIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    VALUE_LOSSES,
)
from rlsys.algo.coefficients import Coefficient
from rlsys.algo.measures import EffectiveShare, Max, Mean, Measure, Min, Std, Sum, merge
from rlsys.algo.prepass import Prepass
from rlsys.algo.rows import LEGEND, RowFacts, Scope, call_row, call_whole, collect, facts_of, inputs_of, row, settle
from rlsys.algo.segments import Segments
from rlsys.algo.trial import trial_inputs, try_row

TABLES: Mapping[str, Mapping[str, Callable]] = {name: getattr(rlsys.algo, name) for name in rlsys.algo.__all__}
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]
NEEDED = {  # parameters without a default
    "seq_mean_token_sum_norm": {"max_tokens": 8},
    "constant": {"tokens": 8},
    "overlong_penalty": {"buffer": 4},
    "roc": {"keep": 2},
}


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flags(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def values_of(measures: Mapping[str, Measure]) -> dict[str, float | None]:
    return {name: measure.value() for name, measure in measures.items()}


# --- measures


def test_measures_of_parts_combine_to_the_measure_of_the_whole():
    torch.manual_seed(0)
    values, mask = torch.randn(40), torch.rand(40) < 0.5
    for kind in (Mean, Max, Min, Std, EffectiveShare):
        parts = [{"m": kind.of(values[here], mask[here])} for here in (slice(0, 3), slice(3, 30), slice(30, 40))]
        merged = merge(merge(parts[0], parts[1]), parts[2])
        assert merged["m"].value() == pytest.approx(kind.of(values, mask).value())
    chosen = values[mask].double()
    assert Mean.of(values, mask).value() == pytest.approx(float(chosen.mean()))
    assert Std.of(values, mask).value() == pytest.approx(float(chosen.std(unbiased=False)))
    assert Min.of(values, mask).value() == float(chosen.min())
    assert Max.of(values, mask).value() == float(chosen.max())
    assert Sum(doubles(1)).plus(Sum(doubles(2))).value() == 3.0


def test_effective_share_is_kishs():
    # (1 + 3)^2 / (2 (1 + 9))
    assert EffectiveShare.of(floats(1, 3, 9), flags(1, 1, 0)).value() == pytest.approx(16 / 20)


def test_measure_of_nothing_has_no_value():
    for kind in (Mean, Max, Min, Std, EffectiveShare):
        assert kind.of(floats(1.0), flags(0)).value() is None


# --- aggregations: losses 1, 2 of the first sequence, 6 of the second; the third has no weighted token

SEGMENTS = Segments(torch.tensor([0, 3, 4]), 6)
MASK = flags(1, 1, 0, 1, 0, 0)
LOSSES = floats(1, 2, 99, 6, 99, 99)
AGGREGATED = {
    "token_mean": ({}, 9 / 3),
    "token_sum": ({}, 9),
    "seq_mean_token_mean": ({}, (1.5 + 6) / 2),
    "seq_mean_token_sum": ({}, (3 + 6) / 2),
    "seq_mean_token_sum_norm": ({"max_tokens": 3}, (3 / 3 + 6 / 3) / 2),
    "constant": ({"tokens": 6}, 9 / 6),
    "prompt_mean": ({}, (1.5 + 6) / 2),
}


@pytest.mark.parametrize("name", AGGREGATED)
def test_aggregation_is_the_sum_of_weighted_losses_over_the_count(name):
    parameters, wanted = AGGREGATED[name]
    inputs = {"mask_T": MASK, "segments": SEGMENTS, "prompt_tokens_S": floats(2, 1, 5)}
    result = call_row(functools.partial(AGGREGATIONS[name], **parameters), inputs)
    total = (result.coefficients_T * LOSSES).sum().item()
    assert total / (1.0 if result.count is None else result.count.item()) == pytest.approx(wanted)
    assert result.coefficients_T[~MASK].tolist() == [0, 0, 0]


def test_a_prompt_in_two_microbatches_counts_once():
    # three tokens of one prompt, two here and one there: (1 + 2) / 3 + 6 / 3, the counts 2 / 3 + 1 / 3
    parts = [
        AGGREGATIONS["prompt_mean"](flags(1, 1), Segments(torch.tensor([0]), 2), floats(3)),
        AGGREGATIONS["prompt_mean"](flags(1), Segments(torch.tensor([0]), 1), floats(3)),
    ]
    assert sum(part.count.item() for part in parts) == pytest.approx(1.0)
    assert parts[0].coefficients_T.tolist() == pytest.approx([1 / 3, 1 / 3])


# --- coefficients


def test_coefficients_move_as_their_papers_say():
    assert COEFFICIENTS["fixed"](0.1) == Coefficient(kept=0.1, applied=0.1)
    # measured 9 against 6 is 50% too much, held at 20%: 1 + 0.2 * 512 / 10240
    grown = COEFFICIENTS["adaptive_kl"](2.0, 9.0, 512, target=6.0, horizon=10_240.0)
    assert grown.kept == grown.applied == pytest.approx(2.0 * 1.01)
    # 5.4 is 10% too little: 1 - 0.1 * 512 / 10240
    fallen = COEFFICIENTS["adaptive_kl"](2.0, 5.4, 512, target=6.0, horizon=10_240.0)
    assert fallen.applied == pytest.approx(2.0 * 0.995)
    assert COEFFICIENTS["linear_decay"](0.4, 1, 3, last=0.1).applied == pytest.approx(0.3)
    assert COEFFICIENTS["linear_decay"](0.4, 7, 3, last=0.1).applied == pytest.approx(0.1)


def test_an_entropy_bonus_acts_only_below_its_target():
    adaptive = COEFFICIENTS["adaptive_entropy"]
    assert adaptive(0.01, 0.1).kept == adaptive(0.01, 0.1).applied == pytest.approx(0.015)
    assert (adaptive(0.01, 0.3).kept, adaptive(0.01, 0.3).applied) == (pytest.approx(0.005), 0.0)
    assert adaptive(0.001, 0.3).kept == 0.0 and adaptive(0.999, 0.1).kept == 1.0


# --- the tables


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_every_row_has_its_name_a_formula_a_source_and_inputs_of_the_legend(table, name):
    function = TABLES[table][name]
    assert function.__name__ == name
    facts = facts_of(function)
    assert facts.source and facts.peers or name == "none"
    assert inspect.getdoc(function)
    assert set(inputs_of(function)) <= LEGEND.keys()
    assert (facts.prepass is not None) == (facts.scope is Scope.BATCH) == ("settled" in inputs_of(function))
    assert not facts.aggregations or set(facts.aggregations) <= AGGREGATIONS.keys()


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_every_row_can_be_tried_and_refuses_an_unknown_parameter(table, name):
    bound = functools.partial(TABLES[table][name], **NEEDED.get(name, {}))
    try_row(bound)
    with pytest.raises(TypeError):
        try_row(functools.partial(bound, no_such_parameter=1.0))


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_every_parameter_of_a_row_is_a_keyword_with_a_type(table, name):
    for parameter in inspect.signature(TABLES[table][name], eval_str=True).parameters.values():
        if parameter.name not in LEGEND:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert parameter.annotation is not inspect.Parameter.empty


def test_only_rejecting_rows_shrink_the_count():
    shrinking = {name for name, function in CORRECTIONS.items() if not facts_of(function).keeps_count}
    assert shrinking == {name for name in CORRECTIONS if name.startswith("reject") or name == "veto"}
    for rows in (ADVANTAGES, POLICY_LOSSES, VALUE_LOSSES, KL_ESTIMATORS, AGGREGATIONS):
        assert all(facts_of(function).keeps_count for function in rows.values())


def test_a_row_is_given_what_its_parameters_are_named_after():
    def last(mask_T, policy_logprobs_T, *, factor: float = 1.0):
        return policy_logprobs_T[mask_T][-1] * factor

    inputs = {"policy_logprobs_T": floats(1, 2, 3), "mask_T": flags(1, 1, 0), "advantages_T": None}
    assert call_row(last, inputs) == 2.0
    assert call_row(functools.partial(functools.partial(last, factor=5.0), factor=3.0), inputs) == 6.0
    assert facts_of(last) == RowFacts()
    with pytest.raises(TypeError, match="last asks for policy_logprobs_T; given: mask_T"):
        call_row(last, {"mask_T": flags(1)})


def test_a_row_whose_input_the_legend_does_not_name_cannot_be_declared():
    with pytest.raises(AssertionError, match="logprob_T"):

        @row(RowFacts(source="nowhere"))
        def wrong(logprob_T):
            return logprob_T


def test_the_prepass_of_a_row_is_given_the_rows_parameters():
    lite_ppo = functools.partial(ADVANTAGES["lite_ppo"], eps=0.0)
    inputs = {"rewards_S": doubles(0, 2, 4, 6), "group_starts_G": torch.tensor([0, 2])}
    parts = [{**inputs, "rewards_S": inputs["rewards_S"][here]} for here in (slice(0, 1), slice(1, 4))]
    first, second = (collect(lite_ppo, part) for part in parts)
    assert first is not None and second is not None
    settled = settle(lite_ppo, first.plus(second))
    # squares of -3, -1, 1, 3 are 20 in all, over 3
    assert settled is not None and settled["variance"].item() == pytest.approx(20 / 3)
    together = call_row(lite_ppo, inputs, settled)
    torch.testing.assert_close(together, doubles(-1, 1, -1, 1) / math.sqrt(20 / 3))
    torch.testing.assert_close(call_whole(lite_ppo, inputs), together)
    with pytest.raises(TypeError, match="settled"):
        call_row(lite_ppo, inputs)


def test_batch_scope_without_a_prepass_cannot_be_declared():
    with pytest.raises(AssertionError):
        RowFacts(scope=Scope.BATCH)
    with pytest.raises(AssertionError):
        RowFacts(prepass=Prepass(collect=len, settle=len))


def test_trial_inputs_name_everything_in_the_legend():
    assert trial_inputs().keys() | {"settled"} == LEGEND.keys()
