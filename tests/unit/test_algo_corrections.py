"""Every row of CORRECTIONS against values worked out by hand."""

import functools
import math

import pytest
import torch

from rlsys.algo import CORRECTIONS
from rlsys.algo.rows import call_row, call_whole, facts_of
from rlsys.algo.segments import Segments
from tests.unit.test_algo import doubles, flags, values_of

# Two sequences of three tokens; in the second, a token of the environment with garbage on it parts two turns.
# k = proximal / behaviour = 0.5, 1, 4 | 2, -, 0.25: products 2 and 0.5, geometric means 2^(1/3) = 1.26 and 0.5^(1/2)
# log k = -0.693147, 0, 1.386294 | 0.693147, -, -1.386294
NAN = math.nan
INPUTS = {
    "proximal_logprobs_T": doubles(0.2, 0.3, 0.4, 0.4, NAN, 0.1).log(),
    "policy_logprobs_T": doubles(0.2, 0.3, 0.4, 0.4, NAN, 0.1).log(),
    "behaviour_logprobs_T": doubles(0.4, 0.3, 0.1, 0.2, 0.0, 0.4).log(),
    "advantages_T": doubles(-1, 1, -1, 1, NAN, -1),
    "mask_T": flags(1, 1, 1, 1, 0, 1),
    "segments": Segments(torch.tensor([0, 3]), 6),
}
WEIGHTED = flags(1, 1, 1, 1, 0, 1)

WEIGHTS = [  # of the five weighted tokens
    ("none", {}, [1, 1, 1, 1, 1]),
    ("tis", {}, [0.5, 1, 2, 2, 0.25]),
    ("importance", {"high": 3.0}, [0.5, 1, 3, 2, 0.25]),
    ("importance", {"mode": "clip", "low": 0.6, "high": 3.0}, [0.6, 1, 3, 2, 0.6]),
    ("importance", {"mode": "mask", "low": 0.4, "high": 3.0}, [0.5, 1, 0, 2, 0]),
    ("importance", {"level": "sequence", "high": 1.5}, [1.5, 1.5, 1.5, 0.5, 0.5]),
    # the first sequence is one turn, the second two
    ("importance", {"level": "turn", "mode": "clip", "low": 0.5, "high": 1.5}, [1.5, 1.5, 1.5, 1.5, 0.5]),
    ("importance", {"level": "geometric", "mode": "mask", "low": 0.9, "high": 1.3}, [2 ** (1 / 3)] * 3 + [0, 0]),
    ("aipo", {"rho": 3.0}, [0.5, 1, 3, 2, 0.25]),
    ("icepop", {"low": 0.4, "high": 3.0}, [0.5, 1, 0, 2, 0]),
    ("policy_icepop", {"low": 0.4, "high": 3.0}, [0.5, 1, 0, 2, 0]),
    # both ways: 0.2 and 0.4 give 0.091516 and 0.104650; 0.4 and 0.1 give 0.311239 and 0.226289; 0.3 and 0.3 give 0
    ("kpop", {"limit": 0.2}, [0.5, 1, 0, 2, 0]),
    ("kpop", {"limit": 0.1}, [0, 1, 0, 0, 0]),
    ("mis", {"high": 1.5}, [0, 0, 0, 0.5, 0.5]),
    # uncut weights where the geometric mean is within bounds
    ("seq_mask_tis", {"low": 0.8, "high": 2.0}, [0.5, 1, 4, 0, 0]),
    # mean log(behaviour / policy) is -0.231 and 0.347: of the second sequence, the token with A < 0
    ("opsm", {}, [1, 1, 1, 1, 0]),
    # 0.5 + 1 + 2 + 2 + 0.25 = 5.75, over 5 tokens
    ("normalised_tis", {}, [0.5 / 1.15, 1 / 1.15, 2 / 1.15, 2 / 1.15, 0.25 / 1.15]),
    # 2 is cut to 1, (1 + 0.5) / 2 = 0.75 over sequences
    ("normalised_tis", {"level": "sequence", "cap": 1.0}, [4 / 3, 4 / 3, 4 / 3, 2 / 3, 2 / 3]),
    # squares of log k, sorted: 0, 0.480, 0.480, 1.922, 1.922; running means 0, 0.240, 0.320, 0.721, 0.961
    ("m2po", {"threshold": 0.4}, [1, 1, 0, 1, 0]),
    # 0.240 is below, but the second 0.480 would bring 0.320: equal values go together
    ("m2po", {"threshold": 0.3}, [0, 1, 0, 0, 0]),
    ("m2po", {"threshold": 1.0}, [1, 1, 1, 1, 1]),
]

KEPT = [  # of the five weighted tokens
    ("reject_k1", {"over": "token", "low": 0.4, "high": 3.0}, [1, 1, 0, 1, 0]),
    ("reject_k1", {"over": "sum", "low": 0.9, "high": 3.0}, [1, 1, 1, 0, 0]),
    ("reject_k1", {"low": 0.9, "high": 1.3}, [1, 1, 1, 0, 0]),
    # (log k)^2 / 2 = 0.240, 0, 0.961 | 0.240, 0.961: means 0.400 and 0.601
    ("reject_k2", {"high": 0.5}, [1, 1, 0, 1, 0]),
    ("reject_k2", {"over": "mean", "high": 0.5}, [1, 1, 1, 0, 0]),
    ("reject_k2", {"over": "sum", "high": 1.2}, [0, 0, 0, 0, 0]),
    ("reject_k2", {"over": "max", "high": 0.97}, [1, 1, 1, 1, 1]),
    # k - 1 - log k = 0.193147, 0, 1.613706 | 0.306853, 0.636294: sums 1.807 and 0.943, means 0.602 and 0.472
    ("reject_k3", {"over": "token", "high": 0.4}, [1, 1, 0, 1, 0]),
    ("reject_k3", {"over": "sum", "high": 1.0}, [0, 0, 0, 1, 1]),
    ("reject_k3", {"high": 0.5}, [0, 0, 0, 1, 1]),
    ("reject_k3", {"over": "max", "high": 1.0}, [0, 0, 0, 1, 1]),
    ("reject_binary_kl", {"high": 0.2}, [1, 1, 0, 1, 0]),
    # proximal - behaviour = -0.2, 0, 0.3 | 0.2, -0.3
    ("reject_difference", {"low": -0.25, "high": 0.25}, [1, 1, 0, 1, 0]),
    ("reject_difference", {"low": -0.1, "high": 0.31}, [0, 1, 1, 1, 0]),
    # products 0.024 - 0.012 and 0.04 - 0.08
    ("reject_difference", {"level": "sequence", "low": -0.02, "high": 0.02}, [1, 1, 1, 0, 0]),
    ("veto", {"low": 0.3}, [1, 1, 1, 0, 0]),
    ("veto", {"low": 0.1, "high": 3.0}, [0, 0, 0, 1, 1]),
]


@pytest.mark.parametrize(("name", "parameters", "wanted"), WEIGHTS)
def test_weights_are_those_worked_out_by_hand_and_keep_the_count(name, parameters, wanted):
    result = call_whole(functools.partial(CORRECTIONS[name], **parameters), INPUTS)
    torch.testing.assert_close(result.weights_T[WEIGHTED].double(), doubles(*wanted), rtol=0, atol=1e-6)
    assert result.mask_T.equal(INPUTS["mask_T"])
    assert result.weights_T.isfinite().all()


@pytest.mark.parametrize(("name", "parameters", "wanted"), KEPT)
def test_rejections_are_those_worked_out_by_hand_and_weight_nothing(name, parameters, wanted):
    result = call_row(functools.partial(CORRECTIONS[name], **parameters), INPUTS)
    assert result.mask_T.tolist() == [bool(x) for x in (*wanted[:4], 0, wanted[4])]
    assert result.weights_T.tolist() == [1] * 6
    (share,) = (v for k, v in values_of(result.measures).items() if k.endswith("_masked_fraction"))
    assert share == pytest.approx(1 - sum(wanted) / 5)


def test_every_correction_has_a_golden_value():
    assert {case[0] for case in (*WEIGHTS, *KEPT)} == CORRECTIONS.keys()
    assert {case[0] for case in KEPT} == {n for n, row in CORRECTIONS.items() if not facts_of(row).keeps_count}


def test_bounds_of_a_rejection_are_on_proximal_over_behaviour():
    """0.1 to 1.2 keeps k = 0.25 and rejects k = 4; on 1 / k it would be the other way round."""
    kept = call_row(functools.partial(CORRECTIONS["reject_k1"], over="token", low=0.1, high=1.2), INPUTS).mask_T
    assert kept.tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_a_correction_passes_no_gradient(name):
    inputs = {key: value.clone().requires_grad_() if "logprobs" in key else value for key, value in INPUTS.items()}
    assert not call_whole(CORRECTIONS[name], inputs).weights_T.requires_grad


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_where_the_policies_are_one_every_correction_changes_nothing(name):
    inputs = {
        **INPUTS,
        "policy_logprobs_T": INPUTS["behaviour_logprobs_T"],
        "proximal_logprobs_T": INPUTS["behaviour_logprobs_T"],
    }
    result = call_whole(CORRECTIONS[name], inputs)
    assert result.weights_T[WEIGHTED].tolist() == [1] * 5
    assert result.mask_T.equal(INPUTS["mask_T"])


def test_shares_out_of_bounds_are_measured():
    measured = values_of(call_row(functools.partial(CORRECTIONS["icepop"], low=0.4, high=3.0), INPUTS).measures)
    assert measured["rollout_corr/rollout_is_ratio_fraction_high"] == pytest.approx(1 / 5)
    assert measured["rollout_corr/rollout_is_ratio_fraction_low"] == pytest.approx(1 / 5)
    assert measured["rollout_corr/rollout_is_oob_ratio"] == pytest.approx(2 / 5)
    # truncation does not touch what is below
    truncated = values_of(call_row(functools.partial(CORRECTIONS["tis"], cap=3.0), INPUTS).measures)
    assert truncated["rollout_corr/rollout_is_oob_ratio"] == pytest.approx(1 / 5)
    factor = values_of(call_whole(CORRECTIONS["normalised_tis"], INPUTS).measures)
    assert factor["rollout_corr/rollout_is_batch_norm_factor"] == pytest.approx(1.15)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tis", {"cap": -1.0}),
        ("importance", {"level": "segment"}),
        ("importance", {"mode": "cut"}),
        ("icepop", {"low": 6.0}),
        ("kpop", {"limit": -1.0}),
        ("m2po", {"threshold": 0.0}),
        ("normalised_tis", {"level": "turn"}),
        ("reject_k1", {"over": "max"}),
        ("reject_k1", {"low": 0.0}),
        ("reject_k3", {"over": "median"}),
        ("reject_difference", {"low": -2.0}),
        ("veto", {"low": 3.0, "high": 2.0}),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameters):
    with pytest.raises(AssertionError):
        call_whole(functools.partial(CORRECTIONS[name], **parameters), INPUTS)
