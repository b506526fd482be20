"""Law 1, conservation: every submitted rollout is in exactly one stage until it is trained or dropped by name. And law
5 for draws: every draw is trained, on its way, waiting to be asked again, filtered, or given up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from rlsys.buffer.replay import BufferCounts
from rlsys.controller.state import RunState
from rlsys.errors import LawBroken
from rlsys.prompts.source import SourceCounts
from rlsys.records import DropCause, Prompt, RolloutGroup


class Stage(Enum):
    """Where a rollout stands between submission and its end."""

    QUEUED = "queued"  # admitted, its group not yet with an engine
    PARKED = "parked"  # waiting for an engine with free slots and a version new enough
    RUNNING = "running"  # being sampled
    SCORING = "scoring"  # being scored
    BUFFERED = "buffered"  # waiting to be trained
    LEASED = "leased"  # handed to the learner, not committed


@dataclass(slots=True)
class _Standing:
    prompt: Prompt
    stage: Stage
    num_rollouts: int


class Ledger:
    """Counts rollouts by group and stage. Every change is checked against what the records themselves say.

    Args:
        state: of the run before it was resumed; its finished groups wait in the buffer, what else stood is submitted
            anew.

    Attributes:
        submitted, trained: rollouts.
        dropped: rollouts by cause.
        groups_trained: groups, and so draws.
        given_up: draws that were lost and are not asked again.
        filtered: draws of whose groups ``algo.selection`` left nothing; they are not asked again either.
    """

    def __init__(self, state: RunState) -> None:
        self.trained, self.groups_trained = state.trained, state.groups_trained
        self.given_up, self.filtered = state.given_up, state.filtered
        self.dropped: Counter[DropCause] = Counter(state.dropped)
        self.submitted = self.trained + self.dropped.total()
        self._standing: dict[str, _Standing] = {}
        self._lead = 0
        for group in state.groups:
            self.submit(group.prompt, len(group.rollouts), Stage.BUFFERED)

    @property
    def lead(self) -> int:
        """Rollouts submitted and neither trained nor dropped."""
        return self._lead

    @property
    def num_groups(self) -> int:
        return len(self._standing)

    def submit(self, prompt: Prompt, num_rollouts: int, stage: Stage = Stage.QUEUED) -> None:
        if prompt.group_id in self._standing:
            raise LawBroken(f"group {prompt.group_id} was submitted twice")
        self._standing[prompt.group_id] = _Standing(prompt, stage, num_rollouts)
        self.submitted += num_rollouts
        self._lead += num_rollouts

    def move(self, group_id: str, stage: Stage, num_rollouts: int) -> None:
        """The group reaches ``stage`` with ``num_rollouts`` members, as its record says."""
        self._find(group_id, num_rollouts).stage = stage

    def drop(self, group_id: str, cause: DropCause, num_rollouts: int = 1) -> None:
        standing = self._find(group_id)
        standing.num_rollouts -= num_rollouts
        if standing.num_rollouts < 0:
            raise LawBroken(f"group {group_id} dropped more rollouts than it had ({cause.value})")
        self.dropped[cause] += num_rollouts
        self._lead -= num_rollouts
        if standing.num_rollouts == 0:
            del self._standing[group_id]

    def standing(self, group_id: str) -> int:
        """Rollouts of the group that are neither trained nor dropped."""
        return self._find(group_id).num_rollouts

    def agreeing(self, groups: Iterable[RolloutGroup]) -> tuple[RolloutGroup, ...]:
        """Those of ``groups`` that stand here with as many rollouts as their records hold."""
        return tuple(
            group
            for group in groups
            if group.group_id in self._standing and self._standing[group.group_id].num_rollouts == len(group.rollouts)
        )

    def unfinished(self, finished: Iterable[RolloutGroup]) -> tuple[Prompt, ...]:
        """Questions of the groups that stand here, in the order of their submission, without those of ``finished``."""
        known = {group.group_id for group in finished}
        return tuple(standing.prompt for group_id, standing in self._standing.items() if group_id not in known)

    def drop_rest(self, group_id: str, cause: DropCause) -> int:
        """Drop what stands of a group; returns how many."""
        num_rollouts = self._standing[group_id].num_rollouts if group_id in self._standing else 0
        if num_rollouts:
            self.drop(group_id, cause, num_rollouts)
        return num_rollouts

    def train(self, group_id: str, num_rollouts: int) -> None:
        standing = self._find(group_id, num_rollouts)
        if standing.stage is not Stage.LEASED:
            raise LawBroken(f"group {group_id} was trained while {standing.stage.value}")
        del self._standing[group_id]
        self.trained += num_rollouts
        self.groups_trained += 1
        self._lead -= num_rollouts

    def counts(self) -> dict[Stage, int]:
        by_stage = dict.fromkeys(Stage, 0)
        for standing in self._standing.values():
            by_stage[standing.stage] += standing.num_rollouts
        return by_stage

    def check(self, buffer: BufferCounts | None = None, *, quiet: bool = False) -> None:
        """Assert conservation, and that the buffer counts the same as the ledger.

        ``quiet`` says that no group is on its way into the buffer or out of it, so that the two must agree on what is
        there too.
        Raises LawBroken.
        """
        by_stage = self.counts()
        total = sum(by_stage.values()) + self.trained + self.dropped.total()
        if total != self.submitted or sum(by_stage.values()) != self._lead:
            raise LawBroken(
                f"{self.submitted} rollouts were submitted but {total} are accounted for: {self.describe()}"
            )
        if buffer is None:
            return
        theirs = (buffer.trained, buffer.buffered if quiet else 0, buffer.leased if quiet else 0)
        ours = (self.trained, by_stage[Stage.BUFFERED] if quiet else 0, by_stage[Stage.LEASED] if quiet else 0)
        if theirs != ours:
            raise LawBroken(f"trained, buffered, leased: the buffer counts {theirs} rollouts, the controller {ours}")

    def check_draws(self, counts: SourceCounts) -> None:
        """Assert that every draw of the source is accounted for once. Raises LawBroken."""
        accounted = self.groups_trained + len(self._standing) + counts.waiting + self.given_up + self.filtered
        if counts.drawn != accounted:
            raise LawBroken(
                f"{counts.drawn} draws were handed out, {accounted} are accounted for: trained {self.groups_trained}, "
                f"on their way {len(self._standing)}, waiting {counts.waiting}, given up {self.given_up}, "
                f"filtered {self.filtered}"
            )

    def describe(self) -> str:
        parts = [f"{stage.value} {count}" for stage, count in self.counts().items()]
        parts += [f"trained {self.trained}"]
        parts += [f"dropped ({cause.value}) {count}" for cause, count in self.dropped.items()]
        return ", ".join(parts)

    def _find(self, group_id: str, num_rollouts: int | None = None) -> _Standing:
        standing = self._standing.get(group_id)
        if standing is None:
            raise LawBroken(f"group {group_id} is not on the ledger")
        if num_rollouts is not None and standing.num_rollouts != num_rollouts:
            raise LawBroken(
                f"group {group_id} arrived with {num_rollouts} rollouts, the ledger has {standing.num_rollouts}"
            )
        return standing
