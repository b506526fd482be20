"""One call of a reward function: a number is a reward, everything else a failure that says why."""

import asyncio
import functools
import math
import threading
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.errors import RlsysError
from rlsys.records import Draw, DropCause, Prompt
from rlsys.reward import call
from rlsys.reward.result import RewardFailure, RewardResult
from tests.builders import make_completion

PROMPT = Prompt(draw=Draw(source="s", index=0, epoch=0), content="1+2=", answer="3", fields={"level": 2})


def score_members(function, prompt, texts, timeout_s):
    return call.score_members(function, prompt, [make_completion(text) for text in texts], timeout_s)


def result_with(**wrong: Any) -> RewardResult:
    return RewardResult(**wrong)


def score_returning(value):
    [outcome] = score_members(lambda prompt, completion, answer: value, PROMPT, ["3"], 5.0)
    return outcome


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (1, 1.0),
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array(2), 2.0),
        (torch.tensor(0.25), 0.25),
        (Fraction(3, 4), 0.75),
    ],
)
def test_every_kind_of_number_is_a_reward(value, reward):
    assert score_returning(value) == RewardResult(reward=reward)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "the reward is None (NoneType); it must be a finite number"),
        (math.nan, "the reward is nan; it must be a finite number"),
        (-math.inf, "the reward is -inf"),
        ("1.0", "the reward is '1.0' (str)"),
        (np.zeros(2), "(ndarray)"),
        (RewardResult(math.nan), "the reward is nan"),
        (RewardResult(1.0, {"format": math.inf}), "the part 'format' of the reward is inf"),
        (10**400, "OverflowError"),
        (RewardResult(), "the reward is None"),
        (result_with(turn_rewards=0.5), "RewardResult.turn_rewards is 0.5; it must be a sequence of numbers"),
        (result_with(token_rewards="0.5"), "RewardResult.token_rewards is '0.5'; it must be a sequence"),
        (RewardResult(1.0, token_rewards=[0.0, math.nan]), "RewardResult.token_rewards[1] is nan"),
        (result_with(turn_rewards=[None]), "RewardResult.turn_rewards[0] is None"),
        (RewardResult(turn_rewards=[1.0], token_rewards=[1.0]), "beside turn_rewards and token_rewards"),
    ],
)
def test_what_is_no_finite_number_is_an_error_with_a_sentence(value, sentence):
    outcome = score_returning(value)
    assert isinstance(outcome, RewardFailure) and outcome.cause is DropCause.REWARD_ERROR
    assert sentence in outcome.detail


def test_parts_travel_with_the_reward():
    assert score_returning(RewardResult(1, {"right": True})) == RewardResult(reward=1.0, parts={"right": 1.0})


def test_the_reward_of_the_whole_is_the_sum_of_those_of_its_turns_or_tokens_where_it_is_left_out():
    turns = score_returning(RewardResult(turn_rewards=[1, np.float32(0.5)]))
    assert turns == RewardResult(reward=1.5, turn_rewards=(1.0, 0.5))
    tokens = score_returning(RewardResult(token_rewards=np.array([0.25, 0.0, -1.0])))
    assert tokens == RewardResult(reward=-0.75, token_rewards=(0.25, 0.0, -1.0))
    both = score_returning(RewardResult(3, turn_rewards=[1.0], token_rewards=(0.5,)))
    assert both == RewardResult(reward=3.0, turn_rewards=(1.0,), token_rewards=(0.5,))


def test_a_function_that_names_them_is_given_the_sampled_tokens_and_the_lengths_of_its_turns():
    def ends_of_turns(prompt, completion, answer, completion_ids, turn_lengths, level):
        assert (completion, level) == ("last answer", 2) and isinstance(completion_ids, list)
        return RewardResult(
            token_rewards=[float(token_id == 9) for token_id in completion_ids], parts={"turns": len(turn_lengths)}
        )

    completion = make_completion("last answer", (4, 5, 9), (6, 9))
    [outcome] = call.score_members(ends_of_turns, PROMPT, [completion], 5.0)
    assert outcome == RewardResult(reward=2.0, parts={"turns": 2.0}, token_rewards=(0.0, 0.0, 1.0, 0.0, 1.0))


def test_plain_function_that_returns_a_coroutine_is_told_to_be_async():
    async def inner():
        return 1.0

    [outcome] = score_members(lambda prompt, completion, answer: inner(), PROMPT, ["3"], 5.0)
    assert isinstance(outcome, RewardFailure) and "must be declared with `async def`" in outcome.detail


def misbehave(prompt, completion, answer, level):
    if completion == "raise":
        return dict(level=level)["missing"]
    if completion == "exit":
        raise SystemExit(0)
    if completion == "sleep":
        time.sleep(60)
    if completion == "spin":
        while True:
            pass
    if completion == "swallow":
        try:
            time.sleep(60)
        except BaseException:
            return 0.0
    return float(completion) + level


async def misbehave_async(prompt, completion, answer, level):
    if completion in ("sleep", "swallow"):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if completion == "swallow":
                return 0.0
            raise
    if completion == "cancel":
        raise asyncio.CancelledError
    if completion == "timeout of its own":
        raise TimeoutError("the judge did not answer")
    return misbehave(prompt, completion, answer, level)


ERROR, TIMEOUT = DropCause.REWARD_ERROR, DropCause.REWARD_TIMEOUT


def causes(outcomes):
    return [outcome.cause if isinstance(outcome, RewardFailure) else outcome.reward for outcome in outcomes]


def details(outcomes):
    return [outcome.detail for outcome in outcomes if isinstance(outcome, RewardFailure)]


def test_bad_members_do_not_touch_good_ones_and_order_is_kept():
    completions = ["1", "sleep", "2", "raise", "spin", "exit", "swallow", "3"]
    outcomes = score_members(misbehave, PROMPT, completions, 0.2)
    assert causes(outcomes) == [3.0, TIMEOUT, 4.0, ERROR, TIMEOUT, ERROR, TIMEOUT, 5.0]
    assert "KeyError: 'missing'" in details(outcomes)[1] and 'dict(level=level)["missing"]' in details(outcomes)[1]
    assert "reward.timeout_s=0.2" in details(outcomes)[0]


def test_bad_async_members_do_not_touch_good_ones_and_order_is_kept():
    completions = ["1", "sleep", "2", "raise", "exit", "swallow", "cancel", "timeout of its own", "3"]
    outcomes = score_members(misbehave_async, PROMPT, completions, 0.2)
    assert causes(outcomes) == [3.0, TIMEOUT, 4.0, ERROR, ERROR, TIMEOUT, ERROR, ERROR, 5.0]
    assert "the judge did not answer" in details(outcomes)[-1]


def test_async_members_wait_together():
    async def judge(prompt, completion, answer):
        await asyncio.sleep(0.3)
        return float(completion)

    begin = time.monotonic()
    assert causes(score_members(judge, PROMPT, [str(n) for n in range(20)], 5.0)) == [float(n) for n in range(20)]
    assert time.monotonic() - begin < 3.0  # one after another: 6 s


def test_async_function_keeps_its_event_loop_between_groups():
    loops = []

    async def remember(prompt, completion, answer):
        loops.append(asyncio.get_running_loop())
        return 1.0

    score_members(remember, PROMPT, ["1"], 5.0)
    score_members(remember, PROMPT, ["1"], 5.0)
    assert loops[0] is loops[1]


def test_deadline_is_of_each_call_and_not_of_the_group():
    def slow(prompt, completion, answer):
        time.sleep(0.1)
        return 1.0

    assert causes(score_members(slow, PROMPT, ["3"] * 5, 0.4)) == [1.0] * 5


def test_plain_function_off_the_main_thread_is_refused_rather_than_left_without_a_deadline():
    caught = []

    def work():
        try:
            score_members(misbehave, PROMPT, ["1"], 1.0)
        except RlsysError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_interrupt_by_the_person_is_not_taken_for_a_reward_error():
    def interrupt(prompt, completion, answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_members(functools.partial(interrupt), PROMPT, ["1"], 1.0)
