"""Segments, bounded ratios and the draws of tokens, against values worked out by hand."""

import math

import pytest
import torch

from rlsys.algo.draws import token_draws
from rlsys.algo.ratios import MAX_LOG_RATIO, binary_kl, log_ratio
from rlsys.algo.segments import Segments
from tests.unit.test_algo import flags, floats

THREE = Segments(torch.tensor([0, 3, 4]), 6)
VALUES = floats(1, 2, 4, 8, 16, 32)


def test_reductions_take_each_sequence_apart_and_leave_out_what_is_masked():
    mask = flags(1, 0, 1, 1, 0, 0)
    assert THREE.lengths_S.tolist() == [3, 1, 2]
    assert THREE.index_T.tolist() == [0, 0, 0, 1, 2, 2]
    assert THREE.sum(VALUES).tolist() == [7, 8, 48]
    assert THREE.sum(VALUES, mask).tolist() == [5, 8, 0]
    assert THREE.count(mask).tolist() == [2, 1, 0]
    assert THREE.mean(VALUES, mask).tolist() == [2.5, 8, 0]
    assert THREE.max(VALUES, mask).tolist() == [4, 8, -math.inf]
    assert THREE.spread(floats(1, 2, 3)).tolist() == [1, 1, 1, 2, 3, 3]


def test_nothing_behind_the_mask_reaches_a_reduction_or_its_gradient():
    values = floats(1, math.nan, 3, -math.inf).requires_grad_()
    segments, mask = Segments(torch.tensor([0, 2]), 4), flags(1, 0, 1, 0)
    for reduced in (segments.sum(values, mask), segments.mean(values, mask), segments.max(values, mask)):
        assert reduced.tolist() == [1, 3]
        (gradient,) = torch.autograd.grad(reduced.sum(), values)
        assert gradient.tolist() == [1, 0, 1, 0]


def test_a_suffix_sum_discounts_within_its_sequence_only():
    # 1 + 2 / 2 + 4 / 4, 2 + 4 / 2, 4; 8; 16 + 32 / 2, 32
    assert THREE.suffix_sum(VALUES, 0.5).tolist() == [3, 4, 4, 8, 32, 32]
    assert THREE.suffix_sum(VALUES, 0.0).tolist() == VALUES.tolist()


def test_a_suffix_sum_equals_the_loop_it_replaces():
    torch.manual_seed(0)
    lengths = torch.randint(1, 40, (20,))
    values = torch.randn(int(lengths.sum()), dtype=torch.float64)
    wanted = []
    for part in values.split(lengths.tolist()):
        running, backwards = 0.0, []
        for value in part.flip(0).tolist():
            running = value + 0.9 * running
            backwards.append(running)
        wanted += backwards[::-1]
    got = Segments(lengths.cumsum(0) - lengths, values.numel()).suffix_sum(values, 0.9)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


def test_a_span_is_a_run_of_weighted_tokens_with_what_follows_it():
    segments = Segments(torch.tensor([0, 6]), 9)
    spans = segments.spans(flags(0, 1, 1, 0, 1, 0, 1, 0, 1))
    # the prompt alone; tokens 1 to 3; 4 and 5; then in the second sequence 6 and 7, and 8
    assert spans.starts_S.tolist() == [0, 1, 4, 6, 8]


def test_segments_of_the_weighted_tokens_leave_out_sequences_without_any():
    only = THREE.only(flags(1, 0, 1, 0, 1, 1))
    assert (only.starts_S.tolist(), only.num_tokens) == ([0, 2], 4)
    assert Segments(torch.tensor([0]), 2).only(flags(0, 0)).num_segments == 0


@pytest.mark.parametrize(("starts", "tokens"), [([1], 3), ([0, 2, 2], 3), ([0, 3], 3), ([0, 2, 1], 3), ([], 1)])
def test_starts_that_do_not_cover_the_tokens_are_refused(starts, tokens):
    with pytest.raises(AssertionError):
        Segments(torch.tensor(starts, dtype=torch.int64), tokens)


def test_log_ratio_is_bounded_and_zero_behind_the_mask():
    got = log_ratio(floats(0, -500, math.nan), floats(-500, 0, -math.inf), flags(1, 1, 0))
    assert got.tolist() == [MAX_LOG_RATIO, -MAX_LOG_RATIO, 0]


def test_binary_kl_is_that_of_two_coins_and_finite_at_certainty():
    # 0.2 ln(0.2 / 0.4) + 0.8 ln(0.8 / 0.6) = -0.138629 + 0.230146
    assert binary_kl(floats(0.2), floats(0.4)).item() == pytest.approx(0.091516, abs=1e-6)
    assert binary_kl(floats(1.0, 0.0), floats(0.0, 1.0)).isfinite().all()


def test_a_tokens_draw_depends_on_its_sequence_and_place_alone():
    keys = torch.tensor([7, -1, 2**62])
    together = token_draws(keys, Segments(torch.tensor([0, 3, 4]), 6))
    alone = [token_draws(keys[i : i + 1], Segments(torch.tensor([0]), n)) for i, n in enumerate((3, 1, 2))]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(together.tolist())) == 6


def test_draws_are_uniform():
    draws = token_draws(torch.arange(1000), Segments(torch.arange(0, 100_000, 100), 100_000))
    assert draws.min() >= 0.0 and draws.max() < 1.0
    shares = torch.histc(draws, bins=10, min=0.0, max=1.0) / 100_000
    assert shares.sub(0.1).abs().max() < 0.005  # five standard deviations
    assert draws[:-1].sub(0.5).dot(draws[1:].sub(0.5)) / 1e5 < 0.002  # neighbours tell nothing of each other
