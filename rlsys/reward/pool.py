"""Score groups on worker processes that may hang or die. Nobody waits for a hung reward, and no failure becomes a 0."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from rlsys.errors import TooManyDrops, WaitTimeout
from rlsys.records import DropCause, Prompt, Rollout, RolloutGroup
from rlsys.reward.result import Completion, Outcome, RewardFailure, RewardResult, WorkerDied

GRACE_S = 5.0  # what a call to a worker may take beyond the deadlines of its members: messages, a loaded machine
RESTART_TIMEOUT_S = 120.0  # a new process imports the user's module, which may load much


class RewardWorker(Protocol):
    """A process that runs ``score_members``. It is ready when handed to the pool, and again when ``restart`` returns:
    the pool's deadlines begin with a call, and starting the process must not count."""

    async def score(self, prompt: Prompt, completions: list[Completion]) -> list[Outcome]:
        """One outcome per completion, in their order. Raises WorkerDied."""
        ...

    async def restart(self) -> None:
        """Kill the process, whatever it does, and start a new one."""
        ...


class RewardPool:
    """Gives every rollout of a group its reward, or drops it by its cause.

    Each group goes to one free worker. A worker that passes its hard deadline, or dies, is restarted, and the members
    it held are scored once more, one by one, so that a bad one does not take the others with it (a function with side
    effects may so run twice). The hard deadline counts from when the worker starts on the group, never the wait for a
    free worker; since every use of a worker has one, that wait ends too.
    """

    def __init__(
        self,
        workers: Sequence[RewardWorker],
        *,
        timeout_s: float,
        max_drops_in_a_row: int,
        is_async: bool,
        grace_s: float = GRACE_S,
        restart_timeout_s: float = RESTART_TIMEOUT_S,
    ) -> None:
        """
        Args:
            timeout_s: deadline of one reward call.
            max_drops_in_a_row: so many members dropped one after another, over groups, stop the run.
            is_async: the function scores all members at once (``is_async_reward``), else one after another.
            grace_s: added to every hard deadline.
            restart_timeout_s: deadline of a restart.
        """
        self._workers = list(workers)
        self._timeout_s, self._grace_s, self._restart_timeout_s = timeout_s, grace_s, restart_timeout_s
        self._is_async = is_async
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(self._workers)):
            self._free.put_nowait(index)
        self._unfit: set[int] = set()  # workers that may still be busy with a call nobody waits for
        self._row = _DropRow(max_drops_in_a_row)

    async def score(self, group: RolloutGroup) -> RolloutGroup:
        """The group with a reward on every member that stands; members without one are in ``dropped``.

        Raises:
            TooManyDrops: too many members in a row were dropped; holds the first one's traceback.
            WaitTimeout: a worker did not come back from a restart.
        """
        if not group.rollouts:
            return group
        completions = [Completion.of(rollout) for rollout in group.rollouts]
        index = await self._free.get()
        try:
            outcomes = await self._score_on(index, group.prompt, completions)
        finally:
            self._free.put_nowait(index)
        outcomes = [_fitting(outcome, completion) for outcome, completion in zip(outcomes, completions, strict=True)]
        self._row.add(outcomes)
        return _with_outcomes(group, outcomes)

    async def _score_on(self, index: int, prompt: Prompt, completions: list[Completion]) -> list[Outcome]:
        together = await self._ask(index, prompt, completions)
        if not isinstance(together, RewardFailure):
            return together
        outcomes: list[Outcome] = []
        for completion in completions:
            alone = await self._ask(index, prompt, [completion])
            outcomes += [alone] if isinstance(alone, RewardFailure) else alone
        return outcomes

    async def _ask(self, index: int, prompt: Prompt, completions: list[Completion]) -> list[Outcome] | RewardFailure:
        """One call to a worker: its outcomes, or for what the worker had to be restarted."""
        if index in self._unfit:
            await self._restart(index)
        self._unfit.add(index)  # until it answers: if this call is cancelled, the next one finds the worker busy
        limit_s = self._timeout_s * (1 if self._is_async else len(completions)) + self._grace_s
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                outcomes = await self._workers[index].score(prompt, completions)
        except TimeoutError:
            if not deadline.expired():
                raise
            failure = RewardFailure(
                cause=DropCause.REWARD_TIMEOUT,
                detail=f"the reward worker gave no answer within {limit_s:g} s and was killed",
            )
        except WorkerDied as error:
            failure = RewardFailure(cause=DropCause.REWARD_CRASH, detail=f"the reward worker died: {error}")
        else:
            self._unfit.discard(index)
            return outcomes
        await self._restart(index)  # at once: a hung process would go on burning a core
        return failure

    async def _restart(self, index: int) -> None:
        deadline = asyncio.timeout(self._restart_timeout_s)
        try:
            async with deadline:
                await self._workers[index].restart()
        except TimeoutError:
            if not deadline.expired():
                raise
            raise WaitTimeout(f"reward worker {index} to restart", self._restart_timeout_s) from None
        self._unfit.discard(index)


class _DropRow:
    """Counts members dropped one after another; any success ends the row."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._length = 0
        self._first: RewardFailure | None = None

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Raises TooManyDrops."""
        for outcome in outcomes:
            if isinstance(outcome, RewardResult):
                self._length, self._first = 0, None
                continue
            self._first = self._first or outcome
            self._length += 1
            if self._length >= self._limit:
                raise TooManyDrops(
                    f"{self._length} rollouts in a row got no reward (reward.max_drops_in_a_row={self._limit}). "
                    f"The first of them ({self._first.cause.value}):\n{self._first.detail}"
                )


def _fitting(outcome: Outcome, completion: Completion) -> Outcome:
    """The outcome; a failure where it rewards other turns or tokens than there are."""
    if isinstance(outcome, RewardFailure):
        return outcome
    for name, rewards, wanted in (
        ("turn", outcome.turn_rewards, len(completion.turn_lengths)),
        ("token", outcome.token_rewards, len(completion.token_ids)),
    ):
        if rewards is not None and len(rewards) != wanted:
            return RewardFailure(
                cause=DropCause.REWARD_ERROR,
                detail=f"RewardResult.{name}_rewards holds {len(rewards)} numbers; the rollout has {wanted} "
                f"{'turns' if name == 'turn' else 'sampled tokens'}, and each needs one",
            )
    return outcome


def _with_outcomes(group: RolloutGroup, outcomes: Sequence[Outcome]) -> RolloutGroup:
    scored: list[Rollout] = []
    failed: dict[str, RewardFailure] = {}
    for rollout, outcome in zip(group.rollouts, outcomes, strict=True):
        if isinstance(outcome, RewardFailure):
            failed[rollout.rollout_id] = outcome
            scored.append(rollout)
        else:
            scored.append(
                replace(
                    rollout,
                    reward=outcome.reward,
                    reward_parts=dict(outcome.parts),
                    turn_rewards=None if outcome.turn_rewards is None else tuple(outcome.turn_rewards),
                    token_rewards=None if outcome.token_rewards is None else tuple(outcome.token_rewards),
                )
            )
    group = replace(group, rollouts=tuple(scored))
    for rollout_id, failure in failed.items():
        group = group.drop({rollout_id: failure.cause}, failure.detail)
    return group
