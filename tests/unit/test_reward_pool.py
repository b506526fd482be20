"""The pool's decisions, with scripted workers. Real processes stand in tests/laws/test_no_silent_zero.py."""

import asyncio
import pickle
from dataclasses import replace

import numpy as np
import pytest

from rlsys.errors import TooManyDrops, WaitTimeout
from rlsys.records import NOT_SAMPLED, DropCause
from rlsys.reward.pool import RewardPool
from rlsys.reward.result import RewardFailure, RewardResult, WorkerDied
from tests.builders import make_rollout, make_unscored_group

ERROR = RewardFailure(cause=DropCause.REWARD_ERROR, detail="Traceback: first")


class ScriptedWorker:
    """'2.5' scores 2.5, 'error' fails, 'die' kills the worker, 'hang' never ends; each group takes ``seconds``."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.asked = []
        self.restarts = 0
        self.busy = False

    async def score(self, prompt, completions):
        completions = [completion.text for completion in completions]
        assert not self.busy, "a worker was asked while it was busy"
        self.asked.append(list(completions))
        self.busy = True
        await asyncio.sleep(60 if "hang" in completions else self.seconds)
        if "die" in completions:
            raise WorkerDied("killed by signal 9")
        self.busy = False
        return [ERROR if text == "error" else self.result(float(text)) for text in completions]

    def result(self, reward):
        return RewardResult(reward, {"right": 1.0})

    async def restart(self):
        self.restarts += 1
        self.busy = False


def make_pool(*workers, **changes):
    settings = {"timeout_s": 0.2, "grace_s": 0.2, "max_drops_in_a_row": 100, "is_async": False}
    return RewardPool(workers, **(settings | changes))


def score(pool, *groups):
    async def score_all():
        return await asyncio.gather(*(pool.score(group) for group in groups))

    return asyncio.run(score_all())


def causes(group):
    return {rollout.rollout_id[-1]: rollout.cause for rollout in group.dropped}


def test_members_get_their_rewards_in_order_and_failures_leave_with_their_cause():
    [group] = score(make_pool(ScriptedWorker()), make_unscored_group("1", "error", "0.5"))
    assert [(rollout.rollout_id[-1], rollout.reward) for rollout in group.rollouts] == [("0", 1.0), ("2", 0.5)]
    assert group.rollouts[0].reward_parts == {"right": 1.0}
    [dropped] = group.dropped
    assert dropped.rollout_id == "test:0:0#0/1" and dropped.cause is DropCause.REWARD_ERROR
    assert dropped.detail == "Traceback: first"
    assert group.baseline_rewards == (1.0, 0.5)


@pytest.mark.parametrize(("bad", "cause"), [("hang", DropCause.REWARD_TIMEOUT), ("die", DropCause.REWARD_CRASH)])
def test_member_that_takes_its_worker_along_is_dropped_alone(bad, cause):
    worker = ScriptedWorker()
    [group] = score(make_pool(worker), make_unscored_group("1", bad, "2"))
    assert [rollout.reward for rollout in group.rollouts] == [1.0, 2.0]
    assert causes(group) == {"1": cause}
    assert worker.asked == [["1", bad, "2"], ["1"], [bad], ["2"]]
    assert worker.restarts == 2


def test_waiting_for_a_free_worker_does_not_count_against_the_deadline():
    worker = ScriptedWorker(seconds=0.25)  # three groups take 0.75 s, each may take 0.4 s
    groups = score(make_pool(worker), *(make_unscored_group("1", index=index) for index in range(3)))
    assert [group.rollouts[0].reward for group in groups] == [1.0] * 3
    assert worker.restarts == 0


def test_deadline_grows_with_the_members_of_a_plain_function_only():
    plain, together = ScriptedWorker(seconds=0.5), ScriptedWorker(seconds=0.5)
    score(make_pool(plain), make_unscored_group("1", "1", "1"))
    assert plain.restarts == 0  # 3 x 0.2 s + 0.2 s
    [group] = score(make_pool(together, is_async=True), make_unscored_group("1", "1", "1"))
    assert together.restarts == 4 and set(causes(group).values()) == {DropCause.REWARD_TIMEOUT}


def test_groups_spread_over_free_workers():
    workers = [ScriptedWorker(seconds=0.05) for _ in range(2)]
    score(make_pool(*workers, timeout_s=5.0), *(make_unscored_group("1", index=index) for index in range(4)))
    assert [len(worker.asked) for worker in workers] == [2, 2]


def test_worker_left_busy_by_a_cancelled_call_is_restarted_before_it_is_used_again():
    worker = ScriptedWorker()
    pool = make_pool(worker, timeout_s=5.0)

    async def cancel_then_score():
        lost = asyncio.create_task(pool.score(make_unscored_group("hang")))
        await asyncio.sleep(0.02)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        return await pool.score(make_unscored_group("1"))

    assert asyncio.run(cancel_then_score()).rollouts[0].reward == 1.0
    assert worker.restarts == 1


def test_worker_that_does_not_come_back_is_named():
    class Stuck(ScriptedWorker):
        async def restart(self):
            await asyncio.sleep(60)

    with pytest.raises(WaitTimeout, match="reward worker 0 to restart"):
        score(make_pool(Stuck(), restart_timeout_s=0.05), make_unscored_group("die"))


def test_a_row_of_drops_over_groups_stops_the_run_with_the_first_traceback():
    pool = make_pool(ScriptedWorker(), max_drops_in_a_row=4)
    score(pool, make_unscored_group("1", "error", "error"))
    with pytest.raises(TooManyDrops, match="4 rollouts in a row(.|\n)*Traceback: first") as caught:
        score(pool, make_unscored_group("error", "error"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_any_success_ends_a_row_of_drops():
    pool = make_pool(ScriptedWorker(), max_drops_in_a_row=3)
    for index in range(5):
        score(pool, make_unscored_group("error", "1", "error", index=index))


class TurnWorker(ScriptedWorker):
    """The reward says how many turns, and how many tokens, are rewarded: 2.3 is two turns and three tokens."""

    def result(self, reward):
        turns, tokens = divmod(round(10 * reward), 10)
        return RewardResult(reward, turn_rewards=(0.5,) * turns, token_rewards=(0.25,) * tokens)


def two_turns(group):
    """The group with rollouts of two turns: two sampled tokens, one of the environment, one sampled."""
    sampled_T = np.array([False, False, True, True, False, True])

    def longer(rollout):
        made = make_rollout(rollout.rollout_id, [0, 0, 0, 0], reward=None)
        versions_T = np.where(sampled_T, made.versions_T, NOT_SAMPLED)
        return replace(made, completion=rollout.completion, versions_T=versions_T, loss_mask_T=sampled_T)

    return replace(group, rollouts=tuple(map(longer, group.rollouts)))


def test_rewards_of_turns_and_tokens_travel_with_the_rollout():
    group = two_turns(make_unscored_group("2.3"))
    [scored] = score(make_pool(TurnWorker()), group)
    (rollout,) = scored.rollouts
    assert rollout.turn_rewards == (0.5, 0.5) and rollout.token_rewards == (0.25, 0.25, 0.25)
    assert rollout.reward == 2.3


def test_rewards_for_other_turns_or_tokens_than_there_are_drop_the_rollout_with_a_sentence():
    group = two_turns(make_unscored_group("2.3", "1.3", "2.4"))
    [scored] = score(make_pool(TurnWorker()), group)
    assert causes(scored) == {"1": DropCause.REWARD_ERROR, "2": DropCause.REWARD_ERROR}
    details = [member.detail for member in scored.dropped]
    assert "turn_rewards holds 1 numbers; the rollout has 2 turns" in details[0]
    assert "token_rewards holds 4 numbers; the rollout has 3 sampled tokens" in details[1]
    with pytest.raises(TooManyDrops, match="2 rollouts in a row got no reward(.|\n)*has 2 turns"):
        score(make_pool(TurnWorker(), max_drops_in_a_row=2), group)


def test_group_without_members_asks_nobody():
    worker = ScriptedWorker()
    assert score(make_pool(worker), make_unscored_group()) == [make_unscored_group()]
    assert worker.asked == []
