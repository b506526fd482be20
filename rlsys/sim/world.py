"""A whole simulated run: the real loops, ledger, buffer and sync, around simulated engines and learner."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlsys.buffer.batching import BatchBy, BatchRule
from rlsys.buffer.replay import ReplayBuffer
from rlsys.controller.loops import Loops
from rlsys.controller.parts import Parts
from rlsys.controller.plan import Plan
from rlsys.controller.select import Selector
from rlsys.records import RolloutGroup, Version
from rlsys.rollout.play import PlaySpec
from rlsys.rollout.sim_engine import SimEngine, learning_answer
from rlsys.sim.clock import VirtualClock
from rlsys.sim.fleet import (
    VOCAB_SIZE,
    SimCheckpoints,
    SimDisk,
    SimFleet,
    SimLearner,
    SimMachine,
    SimMachines,
    SimScorer,
    doubled,
    sim_source,
)
from rlsys.weights.pool import NUM_SEGMENTS, SegmentPool

MAX_TOKENS = 16  # of an answer


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What is simulated. Times in (virtual) seconds.

    Attributes:
        cached_rollouts: how many rollouts the cache of an engine holds, whatever its slots; None means all.
        crashes: engine index to the moment at which it dies.
        machines: where engines can come; without any, those of the start are all.
        wanted: engines that are wanted; None: as many as the machines have room for.
        save_s, write_s: a checkpoint holds the learner up, and is written beside the training, for so long.
        start_s: an engine comes up in so many seconds.
        shaping: rows of SHAPINGS, parameters bound.
        selection: names and rows of SELECTIONS, parameters bound.
    """

    steps: int = 10
    replicas: int = 2
    prompts_per_batch: int = 4
    group_size: int = 4
    max_staleness: int = 1
    age_policy: str = "drop"
    oversample: float = 0.0
    batch_by: BatchBy = "prompts"
    tokens_per_batch: int = 0
    slots: int = 16
    cached_rollouts: int | None = None
    num_questions: int = 40
    num_eval: int = 8
    eval_every_steps: int = 3
    checkpoint_every_steps: int = 2
    seed: int = 0
    tokens_per_s: float = 10.0
    score_s: float = 0.05
    step_s: float = 1.0
    export_s: float = 0.1
    save_s: float = 0.1
    write_s: float = 0.3
    half_life_steps: float = 4.0
    score_timeout_s: float = 60.0
    stall_s: float = 120.0
    crashes: Mapping[int, float] = field(default_factory=dict)
    machines: Mapping[str, SimMachine] = field(default_factory=dict)
    wanted: int | None = None
    start_s: float = 3.0
    greedy_baseline: bool = False
    shaping: Sequence[Callable[..., Any]] = ()
    selection: Sequence[tuple[str, Callable[..., Any]]] = ()


class RecordingSink:
    """Keeps everything."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk
        self.steps: list[dict[str, float]] = []
        self.events: list[str] = []

    def step(self, step: int, version: Version, metrics: Mapping[str, float]) -> None:
        self.steps.append({"step": step, **metrics})

    def commit(self, version: Version, draws: Sequence[str]) -> None:
        self._disk.commit(version, draws)

    def rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Not kept."""

    def event(self, text: str) -> None:
        self.events.append(text)

    def live(self, values: Mapping[str, float]) -> None:
        """Not kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimReport:
    """What came of it.

    Attributes:
        trained: for each step the groups that were trained at it.
    """

    loops: Loops
    sink: RecordingSink
    trained: list[tuple[int, tuple[RolloutGroup, ...]]]
    summary: dict[str, float]
    virtual_s: float


def simulate(
    world: World,
    disturb: Callable[[Loops, SimFleet], None] = lambda loops, fleet: None,
    disk: SimDisk | None = None,
) -> SimReport:
    """Run ``world`` to its end. Deterministic. Raises what the run raises, and Deadlock.

    Args:
        disturb: called once before the start, for faults beyond ``world.crashes``.
        disk: of an earlier life of the run, to go on from; None is a new run.
    """

    clock = VirtualClock()
    disk = SimDisk() if disk is None else disk

    async def main() -> SimReport:
        sink = RecordingSink(disk)
        state = disk.resume()
        engines = [_engine(world, index, clock) for index in range(world.replicas)]
        named = {f"rollout-{index}": engine for index, engine in enumerate(engines)}
        fleet = SimFleet(named, clock, world.cached_rollouts)
        machines = SimMachines(
            fleet,
            world.machines,
            clock,
            new_engine=lambda name: _engine(world, int(name.removeprefix("rollout-")), clock),
            start_s=world.start_s,
        )
        learner = SimLearner(clock, state.version, step_s=world.step_s, export_s=world.export_s)
        parts = Parts(
            source=sim_source(world.num_questions, world.num_eval, world.seed),
            fleet=fleet,
            machines=machines,
            scorer=SimScorer(clock, world.score_s),
            grader=SimScorer(clock, world.score_s),
            select=_selector(world),
            buffer=ReplayBuffer(
                max_staleness=world.max_staleness, age_policy=world.age_policy, batch=_batch_rule(world)
            ),
            learner=learner,
            checkpoints=SimCheckpoints(clock, disk, world.save_s, world.write_s),
            make_batch=lambda groups, step: (step, tuple(groups)),
            segments=SegmentPool([f"segment-{number}" for number in range(NUM_SEGMENTS)]),
            sink=sink,
            clock=clock,
        )
        loops = Loops(parts, _plan(world), state)
        disturb(loops, fleet)
        crashes = _schedule(world, engines, machines)
        try:
            await loops.run()
        finally:
            for crash in crashes:
                crash.cancel()
        summary = loops.summary()
        return SimReport(loops=loops, sink=sink, trained=learner.trained, summary=summary, virtual_s=clock.now())

    return clock.run(main())


def _schedule(world: World, engines: Sequence[SimEngine], machines: SimMachines) -> list[asyncio.TimerHandle]:
    """What dies, at its moment."""
    later = asyncio.get_running_loop().call_later
    crashes = [later(moment_s, engines[index].crash) for index, moment_s in world.crashes.items()]
    return crashes + [
        later(machine.leaves_s, machines.crash_at, name)
        for name, machine in world.machines.items()
        if machine.leaves_s < math.inf and not machine.is_drained
    ]


def _engine(world: World, index: int, clock: VirtualClock) -> SimEngine:
    answer = learning_answer(doubled, vocab_size=VOCAB_SIZE, half_life_steps=world.half_life_steps, max_tokens=12)
    # engines of different speed: nothing may rely on their being alike
    return SimEngine(f"rollout-{index}", clock, answer, tokens_per_s=world.tokens_per_s * (1 + 0.3 * index))


def _selector(world: World) -> Selector:
    return Selector(
        shaping=world.shaping, selection=world.selection, correct_at=1.0, max_tokens=MAX_TOKENS, seed=world.seed
    )


def _batch_rule(world: World) -> BatchRule:
    return BatchRule(by=world.batch_by, prompts=world.prompts_per_batch, tokens=world.tokens_per_batch)


def _plan(world: World) -> Plan:
    return Plan(
        steps=world.steps,
        batch=_batch_rule(world),
        max_staleness=world.max_staleness,
        age_policy=world.age_policy,
        oversample=world.oversample,
        slots=world.slots,
        replicas=world.wanted,
        min_compared=2,
        max_retries=3,
        update_share=1.0,
        recomputes=True,
        spec=PlaySpec(
            group_size=world.group_size,
            temperature=1.0,
            max_tokens=MAX_TOKENS,
            seed=world.seed,
            greedy_baseline=world.greedy_baseline,
        ),
        checkpoint_every_steps=world.checkpoint_every_steps,
        eval_every_steps=world.eval_every_steps,
        pass_samples=0,
        pass_at=(),
        correct_at=1.0,
        rollouts_logged=0,
        start_timeout_s=60.0,
        play_timeout_s=60.0,
        score_timeout_s=world.score_timeout_s,
        step_timeout_s=60.0,
        stall_s=world.stall_s,
        engine_cores=1.0,
        trainer_cores=1.0,
    )
