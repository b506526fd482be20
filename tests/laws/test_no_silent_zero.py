"""Law 6: a reward that failed, timed out or was killed is not a reward of 0. On real worker processes."""

import asyncio
import pickle
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from rlsys.errors import TooManyDrops
from rlsys.records import DropCause
from rlsys.reward.pool import RewardPool
from rlsys.reward.result import WorkerDied
from tests.builders import make_unscored_group

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 0.5

SERVE = """
import os, pickle, sys
from rlsys.reward.call import score_members
from rlsys.reward.load import load_reward

answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # a reward function that prints must not write between the answers
function, timeout_s = load_reward(sys.argv[1]), float(sys.argv[2])
answer = b"ready"
while True:
    answers.write(len(answer).to_bytes(8, "big") + answer)
    answers.flush()
    prompt, completions = pickle.load(sys.stdin.buffer)
    answer = pickle.dumps(score_members(function, prompt, completions, timeout_s))
"""


class ProcessWorker:
    """A reward worker in a process of its own, spoken to over pipes."""

    def __init__(self, path, timeout_s):
        self._command = [sys.executable, "-c", SERVE, path, str(timeout_s)]
        self._process = None

    async def score(self, prompt, completions):
        self._pipes()[0].write(pickle.dumps((prompt, completions)))
        return pickle.loads(await self._receive())

    async def restart(self):
        await self.stop()
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, cwd=REPOSITORY, limit=1 << 20
        )
        assert await self._receive() == b"ready"

    async def stop(self):
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()

    async def _receive(self):
        _, answers = self._pipes()
        try:
            length = int.from_bytes(await answers.readexactly(8), "big")
            return await answers.readexactly(length)
        except asyncio.IncompleteReadError:
            raise WorkerDied(f"exit status {await self._process.wait()}") from None

    def _pipes(self):
        return self._process.stdin, self._process.stdout


PLAIN = """
import math, os, time

def reward(prompt, completion, answer):
    print("scoring", completion)
    if completion == "raise":
        raise ValueError("cannot parse")
    if completion == "sleep":
        time.sleep(600)
    if completion == "spin":
        while True:
            pass
    if completion == "swallow":
        while True:
            try:
                time.sleep(600)
            except:
                pass
    if completion == "crash":
        os._exit(7)
    return {"nan": math.nan, "none": None}.get(completion, 1.0 if completion == answer else 0.0)
"""

ASYNC = """
import asyncio, time

async def reward(prompt, completion, answer):
    if completion == "sleep":
        await asyncio.sleep(600)
    if completion == "block":
        time.sleep(600)
    await asyncio.sleep(0.01)
    return 1.0 if completion == answer else 0.0
"""

ERROR, TIMEOUT, CRASH = DropCause.REWARD_ERROR, DropCause.REWARD_TIMEOUT, DropCause.REWARD_CRASH


def score(tmp_path, source, *groups, max_drops_in_a_row=100):
    """Score the groups at once on two processes; the rest of a hung call must not outlive the hard deadline."""
    (tmp_path / "reward.py").write_text(textwrap.dedent(source))

    async def run():
        workers = [ProcessWorker(f"{tmp_path}/reward.py:reward", TIMEOUT_S) for _ in range(2)]
        try:
            await asyncio.gather(*(worker.restart() for worker in workers))
            pool = RewardPool(
                workers,
                timeout_s=TIMEOUT_S,
                grace_s=1.0,
                max_drops_in_a_row=max_drops_in_a_row,
                is_async="async def" in source,
            )
            parts = [make_unscored_group(*group, index=index) for index, group in enumerate(groups)]
            return await asyncio.gather(*(pool.score(part) for part in parts))
        finally:
            for worker in workers:
                await worker.stop()

    return asyncio.run(run())


def fates(group):
    """What became of each member, in member order: its reward, or the cause of its drop."""
    fate = {rollout.rollout_id: rollout.reward for rollout in group.rollouts}
    fate |= {dropped.rollout_id: dropped.cause for dropped in group.dropped}
    return [fate[rollout_id] for rollout_id in sorted(fate)]


def test_no_failure_of_a_plain_function_is_a_reward(tmp_path):
    soft, hard, crash = score(
        tmp_path,
        PLAIN,
        ["3", "raise", "nan", "4", "none", "sleep", "spin", "3"],
        ["3", "swallow", "4"],
        ["3", "crash", "4", "crash"],
    )
    assert fates(soft) == [1.0, ERROR, ERROR, 0.0, ERROR, TIMEOUT, TIMEOUT, 1.0]
    assert fates(hard) == [1.0, TIMEOUT, 0.0]
    assert fates(crash) == [1.0, CRASH, 0.0, CRASH]
    assert "ValueError: cannot parse" in soft.dropped[0].detail
    assert "exit status 7" in crash.dropped[0].detail
    assert soft.baseline_rewards == (1.0, 0.0, 1.0)  # nor does a failure lower the group's baseline


def test_no_failure_of_an_async_function_is_a_reward(tmp_path):
    soft, hard = score(tmp_path, ASYNC, ["3", "sleep", "4"], ["3", "block", "4"])
    assert fates(soft) == [1.0, TIMEOUT, 0.0]
    assert fates(hard) == [1.0, TIMEOUT, 0.0]


def test_function_that_always_fails_stops_the_run_with_its_first_traceback(tmp_path):
    source = "def reward(prompt, completion, answer):\n    raise ValueError(f'no parser for {completion}')\n"
    with pytest.raises(TooManyDrops, match="ValueError: no parser for a") as caught:
        score(tmp_path, source, ["a", "b", "c", "d"], max_drops_in_a_row=4)
    assert "Traceback (most recent call last)" in str(caught.value)
