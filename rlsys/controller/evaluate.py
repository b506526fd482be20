"""Held-out evaluation beside the training: same engines, same scorer, no pause."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import comb

from rlsys.records import NOT_SAMPLED, Prompt, RolloutGroup, Version


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """Result of one evaluation.

    Attributes:
        accuracy: share of the scored answers that are correct.
        pass_at: k to unbiased pass@k.
        num_scored, num_lost: answers; lost ones (a failed reward, a dead engine) count neither way.
        oldest, newest: versions that sampled the answers.
    """

    accuracy: float
    pass_at: dict[int, float]
    num_scored: int
    num_lost: int
    oldest: Version
    newest: Version

    def metrics(self, source: str) -> dict[str, float]:
        return {
            f"val-core/{source}/acc/mean@1": self.accuracy,
            "eval/version_oldest": float(self.oldest.step),
            "eval/version_newest": float(self.newest.step),
            "eval/lost": float(self.num_lost),
        }

    def describe(self) -> str:
        versions = str(self.oldest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"
        lost = f" ({self.num_lost} lost)" if self.num_lost else ""
        return f"accuracy {self.accuracy:.3f} of {self.num_scored} held-out answers{lost}, version {versions}"

    def describe_pass_at(self) -> str:
        return "".join(f", pass@{k} {share:.3f}" for k, share in self.pass_at.items())


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples is correct: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating large language models trained on code". Raises ValueError for k > n.
    """
    if not 0 < k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {num_samples}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


async def evaluate(
    prompts: Sequence[Prompt],
    ask: Callable[[Prompt], Awaitable[RolloutGroup]],
    *,
    correct_at: float,
    pass_at: Sequence[int] = (),
) -> EvalReport:
    """Ask every prompt and count.

    Args:
        ask: plays and scores one group; what it lost is in the group's ``dropped``.
        correct_at: reward from which an answer is correct.
        pass_at: the k to estimate; groups with fewer than k scored samples are left out of that k.
    """
    groups = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    correct_by_group = [
        [rollout.reward is not None and rollout.reward >= correct_at for rollout in group.rollouts] for group in groups
    ]
    num_scored = sum(map(len, correct_by_group))
    codes = [
        int(code)
        for group in groups
        for rollout in group.rollouts
        for code in (rollout.versions_T[rollout.versions_T != NOT_SAMPLED][[0, -1]])
    ]
    return EvalReport(
        accuracy=sum(map(sum, correct_by_group)) / num_scored if num_scored else 0.0,
        pass_at={k: _mean_pass_at(correct_by_group, k) for k in pass_at},
        num_scored=num_scored,
        num_lost=sum(len(group.dropped) for group in groups),
        oldest=Version.from_code(min(codes, default=0)),
        newest=Version.from_code(max(codes, default=0)),
    )


def _mean_pass_at(correct_by_group: Sequence[Sequence[bool]], k: int) -> float:
    estimates = [pass_at_k(len(correct), sum(correct), k) for correct in correct_by_group if len(correct) >= k]
    return sum(estimates) / len(estimates) if estimates else 0.0
