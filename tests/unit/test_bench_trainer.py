"""`rlsys bench trainer`: what is compared is the same work, and the figures are those of the formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.batch.cost import BY_TOKENS
from rlsys.bench.trainer import COMPARISONS, SIZES, figures_of, measure, tokens_of
from rlsys.bench.trainer_batches import Sizes, fill, make_samples, packed, padded, skewed_lengths
from rlsys.bench.trainer_head import HeadFigures

TINY = Sizes(is_tiny=True, sequences=6, longest=24, tokens_per_microbatch=48, rows=2, row_tokens=16, repeats=1)


@given(sequences=st.integers(10, 200), longest=st.integers(100, 2000))
def test_the_mean_length_is_two_fifths_of_the_longest(sequences, longest):
    sizes = Sizes(
        is_tiny=True,
        sequences=sequences,
        longest=longest,
        tokens_per_microbatch=longest,
        rows=1,
        row_tokens=2,
        repeats=1,
    )
    lengths = skewed_lengths(sizes)
    assert max(lengths) == longest and min(lengths) >= 2
    assert sum(lengths) / sequences / longest == pytest.approx(0.4, abs=0.02)


def test_the_padded_form_holds_the_same_tokens_and_the_same_weight():
    samples = make_samples(skewed_lengths(SIZES), vocab_size=50)
    dense, loose = packed(samples, SIZES, BY_TOKENS).for_rank(0), padded(samples, SIZES)
    assert fill(loose) == pytest.approx(0.4, abs=0.01) and fill(dense) > 0.9
    assert dense.num_tokens == loose.num_tokens == sum(skewed_lengths(SIZES))
    for batch in (dense, loose):
        (part,) = batch.parts
        weighted = sum(int(microbatch.weight_mask.sum()) for microbatch in part.microbatches)
        assert weighted == part.num_weighted_tokens == sum(int(sample.weight_mask_T.sum()) for sample in samples)
        gains = sum(float(microbatch.advantages.sum()) for microbatch in part.microbatches)
        assert gains == sum(float(sample.advantages_T.sum()) for sample in samples)
        for microbatch in part.microbatches:
            assert microbatch.token_ids.numel() <= SIZES.tokens_per_microbatch
    assert all(microbatch.token_ids.shape[1] == SIZES.longest for microbatch in loose.parts[0].microbatches)


def test_ratios_are_those_of_the_formulas():
    seconds = {name: 1.0 for sides in COMPARISONS.values() for name in sides}
    seconds |= {"packed": 2.0, "padded": 5.0, "bare": 1.6, "ours_bf16": 0.5, "naive": 1.5, "two_ranks": 0.8}
    seconds |= {"lean": 1.5, "whole_logits": 2.0}
    heads = {
        "float32": HeadFigures(lean_bytes=10, naive_bytes=100, lean_s=3.0, naive_s=2.0),
        "bfloat16": HeadFigures(lean_bytes=12, naive_bytes=100, lean_s=1.0, naive_s=2.0),
    }
    figures = figures_of(seconds, heads, {"packed": 0.9, "padded": 0.4}, dict.fromkeys(seconds, 100))
    assert figures["packed_over_padded"] == 2.5
    assert figures["overhead_over_bare_deepspeed"] == pytest.approx(0.25)
    assert figures["logprob_extra_memory_over_naive"] == 0.12
    assert figures["logprob_seconds_over_naive/float32"] == 1.5
    assert figures["lean_over_whole_logits"] == 0.75
    assert figures["bf16_over_fp32"] == 2.0 and figures["over_naive"] == 1.5 and figures["over_naive_bf16"] == 2.0
    assert figures["two_ranks_over_one"] == pytest.approx(1.25)
    assert figures["tokens_per_s/packed"] == 50.0 and figures["fill/padded"] == 0.4


@pytest.mark.engines
def test_everything_is_measured_at_tiny_size():
    report = measure(TINY)
    names = {name for sides in COMPARISONS.values() for name in sides}
    assert {name.removeprefix("tokens_per_s/") for name in report.figures if "tokens_per_s/" in name} == names
    assert names == tokens_of(TINY).keys()
    assert all(value > 0.0 for name, value in report.figures.items() if name != "overhead_over_bare_deepspeed")
    assert "two ranks" in report.table
