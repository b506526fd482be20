import asyncio

import pytest

from rlsys.buffer.batching import BatchRule
from rlsys.buffer.replay import ReplayBuffer
from rlsys.buffer.staleness import (
    doomed_before,
    drop_stale,
    first_trained_step,
    lead_limit,
    may_start,
    min_engine_step,
)
from rlsys.errors import RlsysError
from rlsys.records import DropCause, Version
from tests.builders import make_group, make_rollout


def new_buffer(prompts: int, max_staleness: int = 1, age_policy: str = "drop") -> ReplayBuffer:
    rule = BatchRule(by="prompts", prompts=prompts)
    return ReplayBuffer(max_staleness=max_staleness, age_policy=age_policy, batch=rule)


def test_groups_are_leased_oldest_first_and_counted_until_they_are_committed():
    async def scenario():
        buffer = new_buffer(2)
        for index in range(3):
            await buffer.put(make_group(index, [[0, 0], [0]]))
        take = await buffer.take(step=0, wait_s=1.0)
        assert [group.prompt.draw.index for group in take.lease.groups] == [0, 1]
        counts = await buffer.counts()
        assert (counts.buffered, counts.leased, counts.trained) == (2, 4, 0)
        await buffer.commit(take.lease.lease_id, Version(incarnation=0, step=1))
        counts = await buffer.counts()
        assert (counts.buffered, counts.leased, counts.trained) == (2, 0, 4)

    asyncio.run(scenario())


def test_a_lease_is_committed_once():
    async def scenario():
        buffer = new_buffer(1)
        await buffer.put(make_group(0, [[0], [0]]))
        take = await buffer.take(step=0, wait_s=1.0)
        await buffer.commit(take.lease.lease_id, Version(incarnation=0, step=1))
        with pytest.raises(RlsysError, match="committed twice"):
            await buffer.commit(take.lease.lease_id, Version(incarnation=0, step=1))

    asyncio.run(scenario())


def test_take_waits_for_the_last_group_and_no_longer_than_told():
    async def scenario():
        buffer = new_buffer(1)
        assert (await buffer.take(step=0, wait_s=0.01)).lease is None
        waiting = asyncio.create_task(buffer.take(step=0, wait_s=5.0))
        await asyncio.sleep(0)
        await buffer.put(make_group(0, [[0], [0]]))
        assert (await waiting).lease is not None

    asyncio.run(scenario())


def test_what_is_too_old_leaves_at_once_by_name_and_its_reward_stays_in_the_baseline():
    async def scenario():
        buffer = new_buffer(2, max_staleness=1)
        await buffer.put(make_group(0, [[0, 2], [1, 2], [2]], rewards=[1.0, 0.0, 0.5]))
        take = await buffer.take(step=2, wait_s=5.0)
        assert take.lease is None
        (left,) = take.shrunk
        assert [member.cause for member in left.dropped] == [DropCause.TOO_STALE]
        assert left.dropped[0].rollout_id.endswith("/0")
        assert left.baseline_rewards == (0.0, 0.5, 1.0)
        assert (await buffer.counts()).dropped == 1

    asyncio.run(scenario())


def test_a_group_that_lost_every_member_leaves_the_buffer():
    async def scenario():
        buffer = new_buffer(1, max_staleness=0)
        await buffer.put(make_group(0, [[0], [0]]))
        take = await buffer.take(step=1, wait_s=5.0)
        assert take.lease is None and take.shrunk[0].rollouts == ()
        counts = await buffer.counts()
        assert (counts.buffered, counts.dropped) == (0, 2)

    asyncio.run(scenario())


def test_unscored_or_single_groups_are_refused():
    async def scenario():
        buffer = new_buffer(1)
        with pytest.raises(RlsysError, match="cannot be buffered"):
            await buffer.put(make_group(0, [[0]]))
        with pytest.raises(RlsysError, match="cannot be buffered"):
            await buffer.put(make_group(0, [[0], [0]], rewards=[1.0, None]))

    asyncio.run(scenario())


def test_one_survivor_of_a_scored_group_is_trained_against_the_whole_baseline():
    group = drop_stale(make_group(0, [[0], [0], [2]]), step=2, max_staleness=1, age_policy="drop")

    async def scenario():
        buffer = new_buffer(1)
        await buffer.put(group)
        assert (await buffer.take(step=2, wait_s=1.0)).lease.groups[0].baseline_rewards == (0.0, 0.0, 1.0)

    asyncio.run(scenario())


def test_under_mask_a_rollout_leaves_only_when_all_of_its_tokens_are_too_old():
    group = make_group(0, [[0, 2], [0, 0], [2, 2]])
    left = drop_stale(group, step=2, max_staleness=1, age_policy="mask")
    assert [rollout.rollout_id[-1] for rollout in left.rollouts] == ["0", "2"]
    assert first_trained_step(step=2, max_staleness=1, age_policy="mask") == 1
    assert first_trained_step(step=2, max_staleness=1, age_policy="drop") == 0


def test_the_lead_is_full_at_eta_plus_one_batches():
    assert lead_limit(max_staleness=1, batch_rollouts=8) == 16
    assert may_start(ahead=3 / 2, max_staleness=1)
    assert not may_start(ahead=4 / 2, max_staleness=1)


def test_oversampling_widens_the_lead_by_so_many_batches():
    assert lead_limit(max_staleness=0, batch_rollouts=8, oversample=0.3) == 11
    assert may_start(ahead=1.25, max_staleness=0, oversample=0.5)
    assert not may_start(ahead=1.5, max_staleness=0, oversample=0.5)
    assert min_engine_step(step=5, ahead=1.25, max_staleness=0) == 5  # never a version that is not made yet


def test_only_under_drop_is_a_rollout_under_way_lost_for_good():
    assert doomed_before(step=5, max_staleness=2, age_policy="drop") == 3
    assert doomed_before(step=1, max_staleness=2, age_policy="drop") == 0
    assert doomed_before(step=5, max_staleness=2, age_policy="mask") == 0
    assert doomed_before(step=5, max_staleness=2, age_policy="pace") == 0


def test_under_pace_nothing_leaves_for_its_age():
    group = make_group(0, [[0], [4]])
    assert drop_stale(group, step=9, max_staleness=1, age_policy="pace") is group


def test_a_budget_of_trained_tokens_is_filled_by_the_oldest_groups_and_never_passed():
    rule = BatchRule(by="trained_tokens", prompts=4, tokens=100)
    assert rule.num_ready([30, 30, 30]) == 0
    assert rule.num_ready([30, 30, 40, 1]) == 3  # filled to the last token
    assert rule.num_ready([30, 30, 30, 30]) == 3
    assert rule.num_ready([140, 5]) == 1  # nothing else could ever hold it


def test_under_a_budget_of_sampled_tokens_all_that_is_finished_is_a_batch():
    rule = BatchRule(by="sampled_tokens", prompts=4, tokens=100)
    assert rule.num_ready([]) == 0
    assert rule.num_ready([1]) == 1
    assert rule.num_ready([200, 300]) == 2


def test_a_batch_of_tokens_leaves_the_rest_for_the_next_one():
    async def scenario():
        rule = BatchRule(by="trained_tokens", prompts=1, tokens=9)
        buffer = ReplayBuffer(max_staleness=1, age_policy="drop", batch=rule)
        for index in range(5):
            await buffer.put(make_group(index, [[1, 1], [1, 1]]))  # four tokens each
        batches = []
        while (take := await buffer.take(step=1, wait_s=0.01)).lease is not None:
            batches.append([group.prompt.draw.index for group in take.lease.groups])
        assert batches == [[0, 1], [2, 3]]
        assert (await buffer.counts()).buffered == 2

    asyncio.run(scenario())


def test_a_rollout_without_a_token_to_train_has_no_age():
    from rlsys.buffer.staleness import oldest_step

    with pytest.raises(ValueError, match="no token to train"):
        oldest_step(make_rollout("r", []))


def test_a_group_starts_only_where_it_will_still_be_young_when_its_turn_comes():
    def oldest_version(step, groups_standing, max_staleness):
        return min_engine_step(step=step, ahead=groups_standing / 4, max_staleness=max_staleness)

    # step 5 is being trained from 4 leased groups; the group behind them is trained at step 6, so at staleness 1 from 5
    assert oldest_version(5, 3, 1) == 4
    assert oldest_version(5, 4, 1) == 5
    # synchronous: a submission is possible only with an empty pipeline, and needs the newest version
    assert oldest_version(5, 0, 0) == 5
    assert oldest_version(0, 0, 3) == 0


def test_what_the_oldest_policy_sampled_is_trained_first_however_late_it_arrived():
    async def scenario():
        buffer = new_buffer(3, max_staleness=3)
        for index, step in enumerate([2, 1, 2, 1]):
            await buffer.put(make_group(index, [[step], [2]]))
        take = await buffer.take(step=2, wait_s=1.0)
        assert [group.prompt.draw.index for group in take.lease.groups] == [1, 3, 0]

    asyncio.run(scenario())
