"""The parts that the controller is handed, typed. The controller wires nothing and never imports ray: real actors,
in-process parts and simulated ones all fit here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.buffer.replay import BufferCounts, Take
from rlsys.controller.state import RunState
from rlsys.prompts.source import SourceCounts
from rlsys.records import (
    LoadReport,
    Prompt,
    RolloutGroup,
    StepReport,
    Version,
    WeightVersion,
)
from rlsys.rollout.clock import Clock
from rlsys.rollout.play import Member, Played, PlaySpec
from rlsys.rollout.router import EngineReport
from rlsys.weights.pool import SegmentPool


class Fleet(Protocol):
    """The rollout engines, by name."""

    def names(self) -> Sequence[str]: ...

    async def play(self, engine: str, prompt: Prompt, member: Member, spec: PlaySpec) -> Played:
        """One rollout, all its turns on this engine. Raises EngineLost; one that is refused comes back as dropped, one
        that is let go as partial. The engine stops playing it where the call is cancelled."""
        ...

    async def interrupt(self, engine: str) -> None:
        """Let go what the engine plays, and wait until all of it has come back. Raises EngineLost."""
        ...

    async def report(self, engine: str) -> EngineReport:
        """What the engine says of itself. Raises EngineLost."""
        ...

    async def load(self, engine: str, weights: WeightVersion) -> LoadReport:
        """Raises WeightsRefused or EngineLost."""
        ...

    async def remove(self, engine: str) -> None:
        """Take an engine out of service for good."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What the machines say at one moment.

    Attributes:
        room: how many more engines each machine has room for, by its name; those without room may be left out.
        leaving: engines whose machine is gone, or about to go.
    """

    room: Mapping[str, int]
    leaving: frozenset[str]


class Machines(Protocol):
    """Where engines stand, and where more of them can."""

    def engines(self) -> Mapping[str, str]:
        """The engines of the start, each with its machine."""
        ...

    async def survey(self) -> Survey:
        """Raises RlsysError where nobody can say at present."""
        ...

    async def start(self, engine: str, machine: str) -> None:
        """Bring up a new engine of that name; from then on the fleet knows it. Raises EngineLost; then, and where this
        is cancelled, nothing of it is left."""
        ...


class Scorer(Protocol):
    async def score(self, group: RolloutGroup) -> RolloutGroup:
        """Give every rollout its reward. One that failed, timed out or was killed is a dropped rollout, never a 0."""
        ...


class Buffer(Protocol):
    async def put(self, group: RolloutGroup) -> None: ...

    async def take(self, step: int, wait_s: float) -> Take:
        """Lease a batch of the oldest groups fit to be trained at ``step``; waits ``wait_s`` seconds at most."""
        ...

    async def commit(self, lease_id: int, version: Version) -> None: ...

    async def counts(self) -> BufferCounts: ...

    async def groups(self) -> tuple[RolloutGroup, ...]:
        """Every group that is here, leased ones first, in the order in which they would be trained."""
        ...

    async def restore(self, groups: Sequence[RolloutGroup], num_trained: int) -> None:
        """Begin where another buffer stood: its groups, and the rollouts it had trained."""
        ...


class Source(Protocol):
    def next(self) -> Prompt: ...

    def counts(self) -> SourceCounts: ...

    def cursor(self, unfinished: Sequence[Prompt]) -> Mapping[str, Any]:
        """Where the source stands, as plain JSON. ``unfinished`` draws were handed out and not trained: a source
        restored from this cursor asks them again, first of all."""
        ...

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Raises ConfigError for a cursor of other questions or another seed."""
        ...

    def requeue(self, prompt: Prompt) -> bool:
        """Ask a lost draw again. False where it was asked too often already and is given up."""
        ...

    def eval_prompts(self) -> Sequence[Prompt]: ...


class Learner(Protocol):
    async def step(self, batch: Any) -> StepReport:
        """Train one batch. Raises Diverged or LearnerFailed."""
        ...

    async def export(self, segment: str, version: Version) -> WeightVersion:
        """Write the weights into the named segment."""
        ...

    async def save(self, folder: str) -> None:
        """Write a plain Hugging Face model folder."""
        ...


class Checkpoints(Protocol):
    """One at a time: a ``begin``, then its ``finish``. Both raise CheckpointFailed; the checkpoints before still
    stand."""

    async def begin(self, state: RunState) -> None:
        """Take a copy of ``state`` and the learner's. The learner stands still meanwhile."""
        ...

    async def finish(self, state: RunState) -> None:
        """Wait until what ``begin`` has taken is kept, so that a later run can go on from it. The learner trains on
        meanwhile."""
        ...


class Sink(Protocol):
    """Where the controller reports to."""

    def commit(self, version: Version, draws: Sequence[str]) -> None:
        """``draws`` were trained into ``version`` (law 5 is audited on these lines)."""
        ...

    def step(self, step: int, version: Version, metrics: Mapping[str, float]) -> None: ...

    def rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None: ...

    def event(self, text: str) -> None:
        """One sentence for the person who watches."""
        ...

    def live(self, values: Mapping[str, float]) -> None:
        """Current state, for the progress view and the gauges; called often."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything the loops drive, handed in."""

    source: Source
    fleet: Fleet
    machines: Machines
    scorer: Scorer  # of what is trained: rewards, and what a teacher says
    grader: Scorer  # of held-out answers: rewards alone
    select: Callable[[RolloutGroup], RolloutGroup]  # what is made of a scored group: ``select.Selector``
    buffer: Buffer
    learner: Learner
    checkpoints: Checkpoints
    make_batch: Callable[[Sequence[RolloutGroup], int], Any]
    segments: SegmentPool
    sink: Sink
    clock: Clock
