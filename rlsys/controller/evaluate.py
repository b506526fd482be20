"""Held-out evaluation beside the training: same engines, same scorer, no pause."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from math import comb, nan

from rlsys.controller.gather import Gatherer
from rlsys.controller.parts import Parts
from rlsys.controller.plan import Plan
from rlsys.controller.roster import Roster
from rlsys.records import NOT_SAMPLED, Prompt, RolloutGroup, Version
from rlsys.rollout.play import PlaySpec

EVAL_SHARE = 0.5  # of the slots: an evaluation beside the training must leave room for it


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """Result of one evaluation.

    Attributes:
        source: where the questions come from.
        accuracy: share of the scored answers that are correct; NaN where none was scored.
        pass_at: k to unbiased pass@k.
        num_scored, num_lost: answers; lost ones (a failed reward, a dead engine) count neither way.
        oldest, newest: versions that sampled the answers.
    """

    source: str
    accuracy: float
    pass_at: dict[int, float]
    num_scored: int
    num_lost: int
    oldest: Version
    newest: Version

    def metrics(self) -> dict[str, float]:
        return {
            f"val-core/{self.source}/acc/mean@1": self.accuracy,
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
        source=prompts[0].draw.source,
        accuracy=sum(map(sum, correct_by_group)) / num_scored if num_scored else nan,
        pass_at={k: _mean_pass_at(correct_by_group, k) for k in pass_at},
        num_scored=num_scored,
        num_lost=sum(len(group.dropped) for group in groups),
        oldest=Version.from_code(min(codes, default=0)),
        newest=Version.from_code(max(codes, default=0)),
    )


def _mean_pass_at(correct_by_group: Sequence[Sequence[bool]], k: int) -> float:
    estimates = [pass_at_k(len(correct), sum(correct), k) for correct in correct_by_group if len(correct) >= k]
    return sum(estimates) / len(estimates) if estimates else nan


class Evaluator:
    """Evaluates on the run's own engines, through the same slots, with its own rewards.

    Args:
        gatherer: plays the groups.
        score: gives a group its rewards.
    """

    def __init__(
        self,
        parts: Parts,
        plan: Plan,
        roster: Roster,
        *,
        gatherer: Gatherer,
        score: Callable[[RolloutGroup], Awaitable[RolloutGroup]],
    ) -> None:
        self._parts, self._plan, self._roster = parts, plan, roster
        self._gatherer, self._score = gatherer, score
        self._num_rounds = 0

    async def run(self, name: str, pass_samples: int) -> tuple[EvalReport, EvalReport | None]:
        """Greedy answers, and ``pass_samples`` sampled ones per question where that is not 0."""
        began, spec = self._parts.clock.now(), replace(self._plan.spec, greedy_baseline=False)
        greedy = await self._round(replace(spec, group_size=1, temperature=0.0), ())
        sampled = (
            await self._round(replace(spec, group_size=pass_samples), self._plan.pass_at) if pass_samples else None
        )
        shown = greedy.describe() + (sampled.describe_pass_at() if sampled else "")
        self._parts.sink.event(f"{name}: {shown}, {self._parts.clock.now() - began:.1f} s")
        self._parts.sink.live({"eval/accuracy": greedy.accuracy})
        return greedy, sampled

    async def _round(self, spec: PlaySpec, pass_at: Sequence[int]) -> EvalReport:
        self._num_rounds += 1  # request ids of one round must not meet those of another
        prompts = [replace(prompt, attempt=self._num_rounds) for prompt in self._parts.source.eval_prompts()]
        share = EVAL_SHARE * self._plan.slots * max(1, len(self._roster.names))  # with none left one may come
        room = asyncio.Semaphore(max(1, int(share)))

        async def ask(prompt: Prompt) -> RolloutGroup:
            group = await self._gatherer.play(prompt, spec, room=room)
            return await self._score(group) if group.rollouts else group

        return await evaluate(prompts, ask, correct_at=self._plan.correct_at, pass_at=pass_at)
