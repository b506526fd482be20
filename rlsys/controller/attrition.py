"""What becomes of groups that lose rollouts: booked by cause, closed where too little is left, asked again or given up.

Three ends of a group without a rollout, each bounded: lost to faults, which is asked again; lost to faults that would
come again, or asked too often, which is given up; and filtered, which nobody did wrong: another question takes its
place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from rlsys.buffer.replay import close_if_too_small
from rlsys.controller.ledger import Ledger
from rlsys.controller.parts import Parts
from rlsys.controller.plan import Plan
from rlsys.errors import TooManyDrops
from rlsys.records import DropCause, Prompt, RolloutGroup
from rlsys.rollout.play import greedy_id

LOST_GROUPS_IN_A_ROW = 64  # groups lost whole to faults, one after another, before the run gives up
MAX_AGED_BATCHES = 10  # so many batches' worth of groups too old, one after another, where that is more; likewise
MAX_FILTERED_BATCHES = 10  # so many batches' worth of groups filtered whole, likewise
AGED = frozenset({DropCause.TOO_STALE, DropCause.STOPPED})
FAULTS = frozenset({DropCause.ENGINE_REFUSED, DropCause.EMPTY})  # asking again would end the same way


class Attrition:
    """Books what groups lose.

    Args:
        room: called whenever there is room for another group.
    """

    def __init__(self, parts: Parts, plan: Plan, ledger: Ledger, room: Callable[[], None]) -> None:
        self._parts, self._plan, self._ledger, self._room = parts, plan, ledger, room
        self._lost_in_a_row = 0
        self._filtered_scores: list[float] = []  # mean score of each group that was filtered whole, in a row
        self._filtered_by: Counter[str] = Counter()  # rows of algo.selection, rollouts that they took of these
        self._num_arrived = self._num_filtered = 0  # groups since the last step

    def close(self, group: RolloutGroup) -> RolloutGroup:
        """Book what the group lost since it was last booked, and close it where too little is left.

        Raises TooManyDrops.
        """
        group = self._closed_if_incomplete(group)
        self._book(group)
        if not group.rollouts:
            ask_again = not all(member.cause in FAULTS for member in group.dropped)
            why = "; ".join(sorted({f"{member.cause.value} {member.detail}".strip() for member in group.dropped}))
            self._lose(group.prompt, why, ask_again=ask_again, is_aged=all(m.cause in AGED for m in group.dropped))
        return group

    def select(self, group: RolloutGroup) -> RolloutGroup:
        """Shape and select a scored group, and book what left. Raises TooManyDrops."""
        left = self._parts.select(group)
        if left.rollouts:
            return self.close(left)
        self._book(left)
        self._ledger.filtered += 1
        self._num_filtered += 1
        self._lost_in_a_row = 0
        self._filtered_scores.append(float(np.mean([rollout.reward for rollout in group.rollouts])))
        self._filtered_by.update(member.detail for member in left.dropped if member.cause is DropCause.FILTERED)
        if len(self._filtered_scores) > max(LOST_GROUPS_IN_A_ROW, MAX_FILTERED_BATCHES * self._plan.batch.prompts):
            raise TooManyDrops(
                f"{len(self._filtered_scores)} groups in a row were filtered whole by algo.selection "
                f"({', '.join(self._filtered_by)}). Their mean score is {np.mean(self._filtered_scores):.4g}: the "
                "questions are too easy or too hard for the model, or the selection is too strict"
            )
        return left

    def arrive(self) -> None:
        """A group reached the buffer: every row of losses ends. Under a budget of tokens it may leave room there."""
        self._lost_in_a_row = 0
        self._filtered_scores.clear()
        self._filtered_by.clear()
        self._num_arrived += 1
        self._room()

    def drain_metrics(self) -> dict[str, float]:
        """Of the groups that were scored since the last call, the share that was filtered whole."""
        total = self._num_filtered + self._num_arrived
        share = self._num_filtered / total if total else 0.0
        self._num_filtered = self._num_arrived = 0
        return {"critic/filtered_groups": share}

    def _closed_if_incomplete(self, group: RolloutGroup) -> RolloutGroup:
        members = {rollout.rollout_id for rollout in group.rollouts}
        is_scored = all(rollout.reward is not None for rollout in group.rollouts)
        if self._plan.spec.greedy_baseline and group.greedy_reward is None and greedy_id(group.group_id) not in members:
            return group.drop(dict.fromkeys(members, DropCause.GROUP_TOO_SMALL), "its greedy rollout is gone")
        least = self._plan.min_compared
        return close_if_too_small(group, least) if is_scored or len(members) < least else group

    def _book(self, group: RolloutGroup) -> None:
        lost = [member for member in group.dropped if self._ledger.stands(member.rollout_id)]
        for member in lost:
            self._ledger.drop(member.rollout_id, member.cause)
        if lost:
            self._room()

    def _lose(self, prompt: Prompt, why: str, *, ask_again: bool, is_aged: bool) -> None:
        if not (ask_again and self._parts.source.requeue(prompt)):
            self._ledger.given_up += 1
            self._parts.sink.event(f"question {prompt.draw} is given up after {prompt.attempt + 1} attempts: {why}")
        self._lost_in_a_row += 1
        # a step forward makes whole batches too old at once
        most = max(LOST_GROUPS_IN_A_ROW, MAX_AGED_BATCHES * self._plan.batch.prompts if is_aged else 0)
        if self._lost_in_a_row >= most:
            raise TooManyDrops(f"{self._lost_in_a_row} groups in a row were lost whole. The last one: {why}")
        self._room()
