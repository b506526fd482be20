"""Groups to samples to microbatches: what is kept, what is cut, and how it is laid out."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from rlsys.batch.cost import TokenCost
from rlsys.batch.pack import pack
from rlsys.batch.rows import fill_rows
from rlsys.batch.tensors import Batch, Microbatch
from rlsys.errors import ConfigError
from rlsys.records import NOT_SAMPLED, Sample, TeacherScores, Version
from tests.builders import make_group

VERSION = Version(incarnation=1, step=5)
PAD = 77


def make_sample(index: int, length: int) -> Sample:
    """Tokens that tell index and place, weight on every other token from the second on."""
    place = np.arange(length)
    weighted = place % 2 == 1
    return Sample(
        rollout_id=f"r{index}",
        token_ids_T=(1000 * (index + 1) + place).astype(np.int32),
        weight_mask_T=weighted,
        behaviour_logprobs_T=np.where(weighted, -1.0 - place, 0.0).astype(np.float32),
        advantages_T=np.where(weighted, index + 0.5, 0.0).astype(np.float32),
        versions_T=np.where(place % 4 == 1, VERSION.code, NOT_SAMPLED).astype(np.int64),
        rewards_T=np.where(place == length - 1, index + 0.25, 0.0).astype(np.float32),
        greedy_reward=float(index),
        is_correct=index % 2 == 0,
        teacher=TeacherScores(
            logprobs_T=(-2.0 - place).astype(np.float32),
            candidate_ids_TK=np.stack([place, place + 1], axis=1).astype(np.int32),
            candidate_logprobs_TK=np.stack([-3.0 - place, -4.0 - place], axis=1).astype(np.float32),
        ),
    )


def make_batch(lengths: list[int], ranks: int = 1, steps: int = 1, budget: int = 64) -> tuple[list[Sample], Batch]:
    samples = [make_sample(index, length) for index, length in enumerate(lengths)]
    batch = pack(
        samples,
        ranks=ranks,
        steps_per_batch=steps,
        tokens_per_microbatch=budget,
        pad_token_id=PAD,
        version=VERSION,
    )
    return samples, batch


def microbatches_of(batch: Batch) -> Iterator[Microbatch]:
    for rank in batch.ranks:
        for part in rank.parts:
            yield from part.microbatches


packings = given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40),
    ranks=st.integers(1, 4),
    steps=st.integers(1, 3),
    budget=st.integers(30, 200),
)


@packings
@settings(max_examples=150, deadline=None)
def test_every_sample_is_packed_exactly_once_with_its_tokens_intact(lengths, ranks, steps, budget):
    samples, batch = make_batch(lengths, ranks, steps, budget)
    seen = []
    for microbatch in microbatches_of(batch):
        free = torch.ones_like(microbatch.token_ids, dtype=torch.bool)
        for segment in microbatch.segments:
            sample = samples[segment.sample]
            seen.append(segment.sample)
            here = (segment.row, slice(segment.offset, segment.offset + segment.length))
            assert segment.length == len(sample.token_ids_T) and bool(free[here].all())
            free[here] = False
            assert np.array_equal(microbatch.token_ids[here], sample.token_ids_T)
            assert np.array_equal(microbatch.weight_mask[here], sample.weight_mask_T)
            assert np.array_equal(microbatch.behaviour_logprobs[here], sample.behaviour_logprobs_T)
            assert np.array_equal(microbatch.advantages[here], sample.advantages_T)
            assert np.array_equal(microbatch.on_policy_mask[here], sample.versions_T == VERSION.code)
            assert np.array_equal(microbatch.position_ids[here], np.arange(segment.length))
        assert bool((microbatch.token_ids[free] == PAD).all())
        assert not microbatch.weight_mask[free].any() and not microbatch.on_policy_mask[free].any()
    assert sorted(seen) == list(range(len(samples)))


@packings
@settings(max_examples=150, deadline=None)
def test_budget_holds_and_ranks_stay_in_step(lengths, ranks, steps, budget):
    samples, batch = make_batch(lengths, ranks, steps, budget)
    assert all(microbatch.token_ids.numel() <= budget for microbatch in microbatches_of(batch))
    assert len(batch.ranks) == ranks
    assert len({len(rank.parts) for rank in batch.ranks}) == 1
    for shares in zip(*(rank.parts for rank in batch.ranks), strict=True):
        assert len({len(share.microbatches) for share in shares}) == 1
        assert len({share.num_weighted_tokens for share in shares}) == 1
        own = sum(int(mb.weight_mask.sum()) for share in shares for mb in share.microbatches)
        assert own == shares[0].num_weighted_tokens > 0
        tokens = [sum(s.length for mb in share.microbatches for s in mb.segments) for share in shares]
        assert max(tokens) - min(tokens) <= max(lengths)
    parts = [
        sum(len(mb.segments) for rank in batch.ranks for mb in rank.parts[index].microbatches)
        for index in range(len(batch.ranks[0].parts))
    ]
    assert len(parts) == min(steps, len(samples)) and max(parts) - min(parts) <= 1
    assert batch.ranks[0].num_tokens == sum(lengths)


@packings
@settings(max_examples=50, deadline=None)
def test_positions_restart_at_samples_only(lengths, ranks, steps, budget):
    _, batch = make_batch(lengths, ranks, steps, budget)
    for microbatch in microbatches_of(batch):
        begins = torch.zeros_like(microbatch.position_ids, dtype=torch.bool)
        begins[:, 0] = True
        for segment in microbatch.segments:
            begins[segment.row, segment.offset] = True
        assert torch.equal(microbatch.position_ids == 0, begins)
        steps_taken = torch.diff(microbatch.position_ids, dim=1)
        assert bool(((steps_taken == 1) | begins[:, 1:]).all())


def test_packing_is_deterministic():
    first, second = (list(microbatches_of(make_batch([5, 9, 9, 3, 17, 4], 2, 1, 40)[1])) for _ in range(2))
    assert [mb.segments for mb in first] == [mb.segments for mb in second]


def test_short_samples_share_the_row_of_the_longest():
    assert fill_rows([4, 10, 3, 6, 3], capacity=10) == [[1], [3, 0], [2, 4]]
    _, batch = make_batch([4, 10, 3, 6, 3], budget=64)
    (microbatch,) = batch.for_rank(0).parts[0].microbatches
    assert microbatch.token_ids.shape == (3, 10)
    assert microbatch.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 0, 1, 2, 3],
        [0, 1, 2, 0, 1, 2, 3, 4, 5, 6],  # the padding goes on counting
    ]


def test_rank_without_rows_gets_one_tiny_microbatch_without_weight():
    _, batch = make_batch([9], ranks=2)
    (empty,) = batch.for_rank(1).parts[0].microbatches
    assert empty.token_ids.shape == (1, 2) and not empty.weight_mask.any() and empty.segments == ()


def test_sample_that_does_not_fit_the_budget_is_a_config_error():
    with pytest.raises(ConfigError, match="tokens_per_microbatch"):
        make_batch([3, 65], budget=64)


def test_weight_on_a_first_token_no_weight_at_all_and_no_samples_are_refused():
    sample = make_sample(0, 5)
    keys = dict(ranks=1, steps_per_batch=1, tokens_per_microbatch=64, pad_token_id=0, version=VERSION)
    with pytest.raises(ValueError, match="nothing predicts it"):
        pack([replace(sample, weight_mask_T=np.ones(5, dtype=np.bool_))], **keys)
    with pytest.raises(ValueError, match="no weighted token"):
        pack([replace(sample, weight_mask_T=np.zeros(5, dtype=np.bool_))], **keys)
    with pytest.raises(ValueError, match="at least one sample"):
        pack([], **keys)


def test_advantage_of_a_group_stands_on_its_sampled_tokens():
    groups = [make_group(0, [[3, 3], [3]], [0.0, 2.0]), make_group(1, [[3], [3, 3, 3]], [1.0, 0.0])]
    samples = build(groups, advantage=partial(grpo, scale_by_std=False), oldest_step=None, correct_at=1.0)
    assert [sample.rollout_id for sample in samples] == ["test:0:0#0/0", "test:0:0#0/1", "test:0:1#0/0", "test:0:1#0/1"]
    assert [sample.advantages_T.tolist() for sample in samples] == [
        [0, 0, -1, -1],
        [0, 0, 1],
        [0, 0, 0.5],
        [0, 0, -0.5, -0.5, -0.5],
    ]
    assert all(np.array_equal(sample.weight_mask_T, sample.advantages_T != 0) for sample in samples)


def test_reward_of_a_dropped_member_stays_in_the_baseline():
    group = replace(make_group(0, [[3], [3]], [1.0, 2.0]), dropped_rewards=(6.0,))
    samples = build([group], advantage=partial(grpo, scale_by_std=False), oldest_step=None, correct_at=1.0)
    assert [sample.advantages_T[-1] for sample in samples] == [-2.0, -1.0]


def test_tokens_older_than_the_oldest_step_lose_their_weight_and_a_sample_without_weight_leaves():
    group = make_group(0, [[4, 4, 5, 6], [4, 4], [5, 5]], [1.0, 2.0, 6.0])
    samples = build([group], advantage=partial(grpo, scale_by_std=False), oldest_step=5, correct_at=1.0)
    assert [sample.rollout_id for sample in samples] == ["test:0:0#0/0", "test:0:0#0/2"]
    assert samples[0].weight_mask_T.tolist() == [False, False, False, False, True, True]
    assert samples[0].advantages_T.tolist() == [0, 0, 0, 0, -2, -2]
    assert samples[1].advantages_T.tolist() == [0, 0, 3, 3]  # the reward of the one that left still counts


def test_unscored_rollout_is_refused_and_empty_groups_give_nothing():
    group = make_group(0, [[3], [3]], [1.0, 2.0])
    unscored = replace(group, rollouts=(group.rollouts[0], replace(group.rollouts[1], reward=None)))
    with pytest.raises(ValueError, match="test:0:0#0/1"):
        build([unscored], advantage=grpo, oldest_step=None, correct_at=1.0)
    assert build([replace(group, rollouts=())], advantage=grpo, oldest_step=None, correct_at=1.0) == []


def test_balance_is_the_mean_rank_over_the_one_that_the_others_wait_for():
    """Two rows of 10 and one, and a call for each rank: a twentieth of the budget."""
    for ranks, wanted in ((1, 1.0), (2, ((20 + 1.5) + (10 + 1.5)) / 2 / (20 + 1.5)), (3, 1.0)):
        _, batch = make_batch([10, 10, 10], ranks=ranks, budget=30)
        assert [rank.balance for rank in batch.ranks] == [pytest.approx(wanted)] * ranks


def test_a_long_sample_has_a_rank_for_itself_where_attention_is_dear():
    """By tokens it would share with the shortest; it costs 1,640, the others 240 and 110."""
    samples = [make_sample(index, length) for index, length in enumerate([40, 15, 15, 15, 10])]
    batch = pack(
        samples,
        ranks=2,
        steps_per_batch=1,
        tokens_per_microbatch=64,
        pad_token_id=PAD,
        version=VERSION,
        cost=TokenCost(linear=1.0, attention=1.0),
    )
    lengths = [[s.length for mb in rank.parts[0].microbatches for s in mb.segments] for rank in batch.ranks]
    assert sorted(map(sorted, lengths)) == [[10, 15, 15, 15], [40]]
