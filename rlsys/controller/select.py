"""What is made of a scored group before it is buffered: its rewards shaped, its greedy member taken out, its rollouts
selected. Pure functions of records; the rows stand in ``algo/``.

Legend: S rollouts of the group, N sampled tokens of all of them one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlsys.algo.rows import call_row, inputs_of
from rlsys.algo.segments import Segments
from rlsys.algo.selection import Selection
from rlsys.records import NOT_SAMPLED, DropCause, Rollout, RolloutGroup, StopReason
from rlsys.rollout.play import greedy_id, rollout_seed

PENALTY = "penalty"  # the reward's part that selections go by
_MANTISSA = 53  # bits of a float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """Shapes and selects as a run is configured to.

    Attributes:
        shaping: rows of SHAPINGS, parameters bound, applied in this order.
        selection: what it is called in messages, and a row of SELECTIONS, parameters bound; applied in this order.
        correct_at: score from which an answer is right.
        max_tokens: most sampled tokens of an answer.
        seed: of the random choices.
    """

    shaping: Sequence[Callable[..., torch.Tensor]] = ()
    selection: Sequence[tuple[str, Callable[..., Selection]]] = ()
    correct_at: float
    max_tokens: int
    seed: int

    def __call__(self, group: RolloutGroup) -> RolloutGroup:
        """The group with shaped rewards, its greedy reward, and what the rows leave of it.

        Each row of the selection sees what the rows before it left.

        Args:
            group: every rollout scored.
        """
        group = without_greedy(self._shaped(group))
        for name, row in self.selection:
            if group.rollouts:
                group = _left(group, call_row(row, self._inputs(group, row)), name)
        return group

    def _shaped(self, group: RolloutGroup) -> RolloutGroup:
        if not self.shaping or not group.rollouts:
            return group
        rewards_S = torch.tensor([rollout.reward for rollout in group.rollouts], dtype=torch.float64)
        for row in self.shaping:
            rewards_S = call_row(row, {**self._inputs(group, row), "rewards_S": rewards_S})
        shaped = zip(group.rollouts, rewards_S.tolist(), strict=True)
        return replace(
            group,
            rollouts=tuple(
                replace(rollout, reward=reward, shaped_by=reward - score_of(rollout)) for rollout, reward in shaped
            ),
        )

    def _inputs(self, group: RolloutGroup, row: Callable[..., Any]) -> dict[str, Any]:
        """What rows may ask for but the rewards; the tokens only where ``row`` does."""
        rollouts = group.rollouts
        scores_S = torch.tensor([score_of(rollout) for rollout in rollouts], dtype=torch.float64)
        return {
            "scores_S": scores_S,
            "correct_S": scores_S >= self.correct_at,
            "lengths_S": torch.tensor([rollout.num_sampled_tokens for rollout in rollouts]),
            "truncated_S": torch.tensor([rollout.stop_reason is StopReason.LENGTH for rollout in rollouts]),
            "penalties_S": torch.tensor(
                [rollout.reward_parts.get(PENALTY, 0.0) for rollout in rollouts], dtype=torch.float64
            ),
            "draws_S": torch.tensor(
                [_draw(self.seed, rollout.rollout_id) for rollout in rollouts], dtype=torch.float64
            ),
            "group_starts_G": torch.tensor([0]),
            "max_tokens": self.max_tokens,
            **(_answers(rollouts) if "answers" in inputs_of(row) else {}),
        }


def _answers(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    sampled = [rollout.token_ids_T[rollout.versions_T != NOT_SAMPLED] for rollout in rollouts]
    lengths_S = torch.tensor([len(token_ids) for token_ids in sampled])
    return {
        "answer_ids_N": torch.from_numpy(np.concatenate(sampled).astype(np.int64)),
        "answers": Segments(lengths_S.cumsum(0) - lengths_S, int(lengths_S.sum())),
    }


def score_of(rollout: Rollout) -> float:
    """What the reward function gave, before any shaping. Raises ValueError for a rollout that is not scored."""
    if rollout.reward is None:
        raise ValueError(f"rollout {rollout.rollout_id} is not scored")
    return rollout.reward - rollout.shaped_by


def without_greedy(group: RolloutGroup) -> RolloutGroup:
    """The group without its greedy member, whose reward becomes ``greedy_reward`` and is in no baseline of the others.
    A group without one stays as it is."""
    member = greedy_id(group.group_id)
    reward = next((rollout.reward for rollout in group.rollouts if rollout.rollout_id == member), None)
    if reward is None:
        return group
    return replace(_without(group, {member: DropCause.BASELINE}), greedy_reward=reward)


def _left(group: RolloutGroup, selection: Selection, name: str) -> RolloutGroup:
    """What a selection leaves of the group."""
    ids = [rollout.rollout_id for rollout in group.rollouts]
    is_kept, is_compared = selection.keep_S.tolist(), selection.baseline_S.tolist()
    leaving = [rollout_id for rollout_id, compared in zip(ids, is_compared, strict=True) if not compared]
    group = _without(group, dict.fromkeys(leaving, DropCause.FILTERED), name)
    untrained = [rollout_id for rollout_id, kept in zip(ids, is_kept, strict=True) if not kept]
    return group.drop(dict.fromkeys(untrained, DropCause.FILTERED), name)


def _without(group: RolloutGroup, causes: Mapping[str, DropCause], detail: str = "") -> RolloutGroup:
    """As ``RolloutGroup.drop``, and the rewards leave the baseline too."""
    return replace(group.drop(causes, detail), dropped_rewards=group.dropped_rewards, dropped_parts=group.dropped_parts)


def _draw(seed: int, rollout_id: str) -> float:
    """A number in [0, 1) of the rollout's own, the same in every process."""
    return (rollout_seed(seed, f"select/{rollout_id}") >> (63 - _MANTISSA)) * 2.0**-_MANTISSA
