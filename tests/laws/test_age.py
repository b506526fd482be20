"""Law 2: under ``drop`` and ``mask`` no token older than max_staleness ever carries weight in a gradient."""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo import ADVANTAGES
from rlsys.batch.build import build
from rlsys.buffer.batching import BatchRule
from rlsys.buffer.replay import ReplayBuffer
from rlsys.buffer.staleness import first_trained_step
from rlsys.records import steps_of
from tests.builders import make_group

rollout_steps = st.lists(st.integers(0, 6), min_size=1, max_size=5).map(sorted)
group_steps = st.lists(st.lists(rollout_steps, min_size=2, max_size=4), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(group_steps, st.integers(0, 3), st.sampled_from(["drop", "mask"]), st.integers(0, 6))
def test_no_token_older_than_the_bound_carries_weight(steps_by_group, max_staleness, age_policy, ahead):
    step = max(max(steps) for group in steps_by_group for steps in group) + ahead % (max_staleness + 2)

    async def lease():
        buffer = ReplayBuffer(
            max_staleness=max_staleness, age_policy=age_policy, batch=BatchRule(by="prompts", prompts=1)
        )
        for index, steps_by_rollout in enumerate(steps_by_group):
            await buffer.put(make_group(index, steps_by_rollout))
        put, groups = (await buffer.counts()).buffered, []
        while (take := await buffer.take(step, wait_s=0.0001)).lease is not None:
            groups += take.lease.groups
        assert sum(len(group.rollouts) for group in groups) == put - (await buffer.counts()).dropped
        return groups

    groups = asyncio.run(lease())
    oldest = first_trained_step(step=step, max_staleness=max_staleness, age_policy=age_policy)
    samples = build(groups, advantage=partial(ADVANTAGES["grpo"]), oldest_step=oldest or None, correct_at=1.0)
    for sample in samples:
        weighted_T = steps_of(sample.versions_T)[sample.weight_mask_T]
        assert weighted_T.size and (step - weighted_T <= max_staleness).all()
    # and nothing young enough was lost: under drop whole rollouts, under mask every young token
    kept = sum(int(np.count_nonzero(sample.weight_mask_T)) for sample in samples)
    bound = step - max_staleness
    expected = sum(
        sum(token >= bound for token in steps) if age_policy == "mask" or min(steps) >= bound else 0
        for group in steps_by_group
        for steps in group
    )
    assert kept == expected
