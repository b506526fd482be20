"""The replay buffer: finished groups wait here to be leased for training, those of the oldest policy first.

A group is buffered -> leased -> trained. What is too old when a batch is taken leaves as dropped, and is named in the
answer at once, so that the controller can ask its question again.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.buffer.batching import BatchRule, sampled_tokens
from rlsys.buffer.staleness import drop_stale, oldest_step
from rlsys.errors import RlsysError
from rlsys.records import DropCause, RolloutGroup, Version

MIN_COMPARED = 2  # rewards, a greedy one included: with fewer there is nothing to compare


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """Groups handed out for one training step. They count as buffered until ``commit``."""

    lease_id: int
    groups: tuple[RolloutGroup, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Take:
    """Answer to ``take``.

    Attributes:
        lease: None where there were not enough groups within the wait.
        shrunk: groups that lost rollouts to age, as they stand now; one without rollouts has left the buffer.
    """

    lease: Lease | None
    shrunk: tuple[RolloutGroup, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferCounts:
    """Rollouts by state, counted by the buffer itself (the controller's ledger must agree: law 1)."""

    buffered: int
    leased: int
    trained: int
    dropped: int


class ReplayBuffer:
    """In-process buffer; the actor around it adds nothing.

    Args:
        max_staleness: eta, steps.
        age_policy: ``drop``, ``mask`` or ``pace``.
        batch: which groups make one.
        min_compared: rewards that a group needs; 1 where rollouts are not compared.
    """

    def __init__(
        self, *, max_staleness: int, age_policy: str, batch: BatchRule, min_compared: int = MIN_COMPARED
    ) -> None:
        self._max_staleness = max_staleness
        self._min_compared = min_compared
        self._age_policy = age_policy
        self._batch = batch
        self._groups: list[RolloutGroup] = []  # by the step of their oldest token, then by arrival
        self._tokens: dict[str, int] = {}  # sampled ones of each of these
        self._leases: dict[int, Lease] = {}
        self._next_lease_id = 0
        self._trained = 0
        self._dropped = 0
        self._arrived = asyncio.Event()

    async def put(self, group: RolloutGroup) -> None:
        """Raises RlsysError for a group that is too small or not scored: it would be trained wrongly, or never."""
        if (
            not group.rollouts
            or close_if_too_small(group, self._min_compared) is not group
            or any(rollout.reward is None for rollout in group.rollouts)
        ):
            raise RlsysError(
                f"group {group.group_id} cannot be buffered: {len(group.rollouts)} rollouts, "
                f"{num_compared(group)} of the group scored, at least {self._min_compared} needed"
            )
        bisect.insort(self._groups, group, key=_oldest_step)
        self._tokens[group.group_id] = sampled_tokens(group)
        self._arrived.set()

    async def take(self, step: int, wait_s: float) -> Take:
        """Lease a batch of groups that may be trained at ``step``, those sampled by the oldest policy first.

        Returns within ``wait_s`` seconds, at once when groups had to be dropped for age and too few are left.
        """
        shrunk: list[RolloutGroup] = []
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    shrunk += self._drop_stale(step)
                    num_groups = self._batch.num_ready([self._tokens[group.group_id] for group in self._groups])
                    if num_groups:
                        return Take(lease=self._lease(num_groups), shrunk=tuple(shrunk))
                    if shrunk:
                        break
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass
        return Take(lease=None, shrunk=tuple(shrunk))

    async def commit(self, lease_id: int, version: Version) -> None:
        """The leased groups are trained into ``version``."""
        if lease_id not in self._leases:
            raise RlsysError(f"lease {lease_id} cannot be committed into {version}: it is not out (committed twice?)")
        lease = self._leases.pop(lease_id)
        self._trained += sum(len(group.rollouts) for group in lease.groups)

    async def groups(self) -> tuple[RolloutGroup, ...]:
        """Every group that is here, leased ones first, in the order in which they would be trained."""
        leased = (group for lease in self._leases.values() for group in lease.groups)
        return (*leased, *self._groups)

    async def restore(self, groups: Sequence[RolloutGroup], num_trained: int) -> None:
        """Begin where another buffer stood: its groups, and the rollouts it had trained."""
        for group in groups:
            await self.put(group)
        self._trained = num_trained

    async def counts(self) -> BufferCounts:
        return BufferCounts(
            buffered=sum(len(group.rollouts) for group in self._groups),
            leased=sum(len(group.rollouts) for lease in self._leases.values() for group in lease.groups),
            trained=self._trained,
            dropped=self._dropped,
        )

    def _lease(self, num_groups: int) -> Lease:
        lease = Lease(lease_id=self._next_lease_id, groups=tuple(self._groups[:num_groups]))
        del self._groups[:num_groups]
        for group in lease.groups:
            del self._tokens[group.group_id]
        self._next_lease_id += 1
        self._leases[lease.lease_id] = lease
        return lease

    def _drop_stale(self, step: int) -> list[RolloutGroup]:
        kept: list[RolloutGroup] = []
        shrunk = []
        for group in self._groups:
            left = drop_stale(group, step=step, max_staleness=self._max_staleness, age_policy=self._age_policy)
            if left is not group:
                left = close_if_too_small(left, self._min_compared)
                self._dropped += len(group.rollouts) - len(left.rollouts)
                shrunk.append(left)
                self._tokens[group.group_id] = sampled_tokens(left)
            if left.rollouts:
                kept.append(left)
            else:
                del self._tokens[group.group_id]
        self._groups = kept
        return shrunk


def _oldest_step(group: RolloutGroup) -> int:
    return min(map(oldest_step, group.rollouts))


def num_compared(group: RolloutGroup) -> int:
    """Rewards that can be compared: those of the baseline, and that of the greedy rollout."""
    return len(group.baseline_rewards) + (group.greedy_reward is not None)


def close_if_too_small(group: RolloutGroup, min_compared: int = MIN_COMPARED) -> RolloutGroup:
    """The group itself, or, where fewer of its rewards can be compared, the group with nothing to train."""
    if not group.rollouts or num_compared(group) >= min_compared:
        return group
    return group.drop({rollout.rollout_id: DropCause.GROUP_TOO_SMALL for rollout in group.rollouts})
