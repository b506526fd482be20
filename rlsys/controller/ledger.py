"""Law 1, conservation: every submitted rollout is in exactly one stage until it is trained or dropped by name. And law
5 for draws: every draw is trained, on its way, waiting to be asked again, filtered, or given up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from rlsys.buffer.batching import sampled_tokens
from rlsys.buffer.replay import BufferCounts
from rlsys.controller.state import RunState
from rlsys.errors import LawBroken
from rlsys.prompts.source import SourceCounts
from rlsys.records import DropCause, Prompt, RolloutGroup


class Stage(Enum):
    """Where a rollout stands between submission and its end."""

    QUEUED = "queued"  # admitted, its group not yet in the line for an engine
    PARKED = "parked"  # waiting for an engine with a free slot and a version new enough
    RUNNING = "running"  # being sampled
    GATHERED = "gathered"  # ended, and waiting for the rest of its group
    SCORING = "scoring"  # being scored
    BUFFERED = "buffered"  # waiting to be trained
    LEASED = "leased"  # handed to the learner, not committed


@dataclass(slots=True)
class _Standing:
    prompt: Prompt
    stages: dict[str, Stage]  # of every rollout that stands, by its id
    tokens: int | None = None  # sampled ones, once the group is finished; 0 once it is leased


class Ledger:
    """Knows every rollout that stands, and its stage. Every change is checked against what the records themselves say.

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
            self.submit(group.prompt, [rollout.rollout_id for rollout in group.rollouts], Stage.BUFFERED)
            self._standing[group.group_id].tokens = sampled_tokens(group)

    @property
    def lead(self) -> int:
        """Rollouts submitted and neither trained nor dropped."""
        return self._lead

    @property
    def num_groups(self) -> int:
        return len(self._standing)

    @property
    def finished_tokens(self) -> int:
        """Sampled tokens of the groups that wait to be leased."""
        return sum(standing.tokens or 0 for standing in self._standing.values())

    @property
    def num_unfinished(self) -> int:
        """Groups that are still on their way to the buffer."""
        return sum(standing.tokens is None for standing in self._standing.values())

    def submit(self, prompt: Prompt, rollout_ids: Sequence[str], stage: Stage = Stage.QUEUED) -> None:
        if prompt.group_id in self._standing:
            raise LawBroken(f"group {prompt.group_id} was submitted twice")
        self._standing[prompt.group_id] = _Standing(prompt, dict.fromkeys(rollout_ids, stage))
        self.submitted += len(rollout_ids)
        self._lead += len(rollout_ids)

    def move(self, rollout_id: str, stage: Stage) -> None:
        """One rollout reaches ``stage``."""
        self._find(group_of(rollout_id), rollout_id)[rollout_id] = stage

    def move_group(self, group: RolloutGroup, stage: Stage) -> None:
        """The group reaches ``stage`` with the rollouts of its record."""
        stages = self._find_group(group)
        for rollout_id in stages:
            stages[rollout_id] = stage
        if stage in (Stage.BUFFERED, Stage.LEASED):
            self._standing[group.group_id].tokens = sampled_tokens(group) if stage is Stage.BUFFERED else 0

    def drop(self, rollout_id: str, cause: DropCause) -> None:
        group_id = group_of(rollout_id)
        stages = self._find(group_id, rollout_id)
        del stages[rollout_id]
        if not stages:
            del self._standing[group_id]
        self.dropped[cause] += 1
        self._lead -= 1

    def stands(self, rollout_id: str) -> bool:
        """Whether the rollout is neither trained nor dropped."""
        standing = self._standing.get(group_of(rollout_id))
        return standing is not None and rollout_id in standing.stages

    def agreeing(self, groups: Iterable[RolloutGroup]) -> tuple[RolloutGroup, ...]:
        """Those of ``groups`` that stand here with the very rollouts that their records hold."""
        return tuple(group for group in groups if self._agrees(group))

    def unfinished(self, finished: Iterable[RolloutGroup]) -> tuple[Prompt, ...]:
        """Questions of the groups that stand here, in the order of their submission, without those of ``finished``."""
        known = {group.group_id for group in finished}
        return tuple(standing.prompt for group_id, standing in self._standing.items() if group_id not in known)

    def train(self, group: RolloutGroup) -> None:
        stages = self._find_group(group)
        not_leased = {stage.value for stage in stages.values() if stage is not Stage.LEASED}
        if not_leased:
            raise LawBroken(f"group {group.group_id} was trained while {', '.join(sorted(not_leased))}")
        del self._standing[group.group_id]
        self.trained += len(stages)
        self.groups_trained += 1
        self._lead -= len(stages)

    def counts(self) -> dict[Stage, int]:
        by_stage = dict.fromkeys(Stage, 0)
        for standing in self._standing.values():
            for stage in standing.stages.values():
                by_stage[stage] += 1
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

    def _find(self, group_id: str, rollout_id: str) -> dict[str, Stage]:
        standing = self._standing.get(group_id)
        if standing is None or rollout_id not in standing.stages:
            raise LawBroken(f"rollout {rollout_id} is not on the ledger")
        return standing.stages

    def _find_group(self, group: RolloutGroup) -> dict[str, Stage]:
        if group.group_id not in self._standing:
            raise LawBroken(f"group {group.group_id} is not on the ledger")
        stages = self._standing[group.group_id].stages
        if not self._agrees(group):
            raise LawBroken(
                f"group {group.group_id} arrived with {len(group.rollouts)} rollouts, the ledger has "
                f"{len(stages)}: {', '.join(stages)}"
            )
        return stages

    def _agrees(self, group: RolloutGroup) -> bool:
        standing = self._standing.get(group.group_id)
        ids = [rollout.rollout_id for rollout in group.rollouts]
        return standing is not None and len(ids) == len(standing.stages) and set(ids) == standing.stages.keys()


def group_of(rollout_id: str) -> str:
    """Id of the group that a rollout belongs to."""
    return rollout_id.rpartition("/")[0]
