"""Simulated rollout workers and learner: the same contracts as the real ones, on virtual time."""

from __future__ import annotations

import asyncio
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlsys.controller.parts import Survey
from rlsys.controller.saving import gone_on_from
from rlsys.controller.state import RunState
from rlsys.envs.single_turn import SingleTurn
from rlsys.errors import EngineLost
from rlsys.prompts.question import Question
from rlsys.prompts.source import LoadedData, PromptSource
from rlsys.prompts.split import Split
from rlsys.records import (
    LoadReport,
    Probe,
    Prompt,
    RolloutGroup,
    StepReport,
    Version,
    WeightVersion,
)
from rlsys.rollout.clock import Clock
from rlsys.rollout.engine import Engine
from rlsys.rollout.play import Member, Played, Player, PlaySpec
from rlsys.rollout.router import EngineReport
from rlsys.rollout.sim_engine import SimEngine

VOCAB_SIZE = 128  # the characters of ASCII
RETURN_POLL_S = 0.01  # between two looks whether what was let go has come back
CACHE_BLOCK_TOKENS = 4  # as long as most of the questions


class CharTokenizer:
    """A token per character; 0 ends an answer."""

    chat_template = None
    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % VOCAB_SIZE for character in text]}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token_id) for token_id in token_ids if token_id or not skip_special_tokens)


class SimFleet:
    """Engines in this process.

    Args:
        cached_rollouts: how many rollouts the key-value cache of an engine holds; what comes beyond them waits inside.
            None: any number.
    """

    def __init__(self, engines: Mapping[str, Engine], clock: Clock, cached_rollouts: int | None = None) -> None:
        self._clock, self._cached = clock, cached_rollouts or sys.maxsize
        self.engines: dict[str, Engine] = {}
        self.removed: set[str] = set()
        self._players: dict[str, Player] = {}
        self._caches: dict[str, asyncio.Semaphore] = {}
        self._running = Counter[str]()
        for name, engine in engines.items():
            self.admit(name, engine)

    def names(self) -> Sequence[str]:
        return tuple(self.engines)

    def admit(self, name: str, engine: Engine) -> None:
        """A further engine, which is up."""
        self.engines[name] = engine
        self._players[name] = Player(engine, name, make_env=SingleTurn, tokenizer=CharTokenizer(), clock=self._clock)
        self._caches[name] = asyncio.Semaphore(self._cached)

    async def play(self, engine: str, prompt: Prompt, member: Member, spec: PlaySpec) -> Played:
        self._running[engine] += 1
        try:
            async with self._caches[engine]:
                return await self._players[engine].play_rollout(prompt, member, spec)
        finally:
            self._running[engine] -= 1

    async def interrupt(self, engine: str) -> None:
        await self.engines[engine].interrupt()
        while self._running[engine]:
            await self._clock.sleep(RETURN_POLL_S)

    async def report(self, engine: str) -> EngineReport:
        running = self._running[engine]
        return EngineReport(
            cache_block_tokens=CACHE_BLOCK_TOKENS,
            num_waiting=max(0, running - self._cached),
            kv_share=min(1.0, running / self._cached),
            num_preempted=0,
        )

    async def load(self, engine: str, weights: WeightVersion) -> LoadReport:
        return await self.engines[engine].load_weights(weights)

    async def remove(self, engine: str) -> None:
        self.removed.add(engine)
        await self.engines[engine].stop()


@dataclass(frozen=True, kw_only=True, slots=True)
class SimMachine:
    """A machine that has room for engines.

    Attributes:
        room: engines at once, those of the start included.
        joins_s, leaves_s: from when to when it is there, seconds.
        is_drained: it says that it leaves, and is not gone at once.
        broken_starts: so many engines that start there fail, the first ones.
        lives_s: an engine that starts there dies after so many seconds; None: it does not.
    """

    room: int
    joins_s: float = 0.0
    leaves_s: float = math.inf
    is_drained: bool = False
    broken_starts: int = 0
    lives_s: float | None = None


class SimMachines:
    """Machines by name. The engines of the start stand on ``HOME``.

    Args:
        new_engine: of a given name.
        start_s: an engine comes up in so many seconds.
    """

    HOME = "home"

    def __init__(
        self,
        fleet: SimFleet,
        machines: Mapping[str, SimMachine],
        clock: Clock,
        *,
        new_engine: Callable[[str], SimEngine],
        start_s: float,
    ) -> None:
        self._fleet, self._machines, self._clock = fleet, machines, clock
        self._new_engine, self._start_s = new_engine, start_s
        self._at = dict.fromkeys(fleet.names(), self.HOME)
        self._started: dict[str, SimEngine] = {}
        self._num_broken = Counter[str]()

    def engines(self) -> Mapping[str, str]:
        return dict.fromkeys(self._fleet.names(), self.HOME)

    async def survey(self) -> Survey:
        now = self._clock.now()
        there = {name: one for name, one in self._machines.items() if one.joins_s <= now < one.leaves_s}
        standing = Counter(machine for name, machine in self._at.items() if name not in self._fleet.removed)
        gone = {name for name, one in self._machines.items() if one.leaves_s <= now}
        return Survey(
            room={name: one.room - standing[name] for name, one in there.items()},
            leaving=frozenset(name for name, machine in self._at.items() if machine in gone),
        )

    async def start(self, engine: str, machine: str) -> None:
        self._at[engine] = machine
        described = self._machines[machine]
        try:
            await self._clock.sleep(self._start_s)
            if self._num_broken[machine] < described.broken_starts:
                self._num_broken[machine] += 1
                raise EngineLost(f"{machine} is broken")
            if self._clock.now() >= described.leaves_s:
                raise EngineLost(f"{machine} is gone")
        except BaseException:
            del self._at[engine]
            raise
        started = self._started[engine] = self._new_engine(engine)
        self._fleet.admit(engine, started)
        if described.lives_s is not None:
            asyncio.get_running_loop().call_later(described.lives_s, started.crash)

    def crash_at(self, machine: str) -> None:
        """It is gone, with all that stood there."""
        for name, engine in self._started.items():
            if self._at[name] == machine:
                engine.crash()


class SimScorer:
    """Exact match, after ``seconds``."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    async def score(self, group: RolloutGroup) -> RolloutGroup:
        await self._clock.sleep(self._seconds)
        answer = str(group.prompt.answer)
        scored = (replace(rollout, reward=float(rollout.completion == answer)) for rollout in group.rollouts)
        return replace(group, rollouts=tuple(scored))


class SimLearner:
    """Takes ``step_s`` for a step and ``export_s`` for an export; remembers what it was given to train."""

    def __init__(self, clock: Clock, version: Version, *, step_s: float, export_s: float) -> None:
        self._clock, self._version = clock, version
        self._step_s, self._export_s = step_s, export_s
        self.trained: list[tuple[int, tuple[RolloutGroup, ...]]] = []

    async def step(self, batch: tuple[int, tuple[RolloutGroup, ...]]) -> StepReport:
        await self._clock.sleep(self._step_s)
        self.trained.append(batch)
        self._version = self._version.next()
        return StepReport(version=self._version, metrics={})

    async def export(self, segment: str, version: Version) -> WeightVersion:
        await self._clock.sleep(self._export_s)
        nothing = Probe(token_ids=(), logprobs=())
        return WeightVersion(version=version, segment=segment, tensors=(), probe=nothing, previous_probe=None)

    async def save(self, folder: str) -> None:
        """There are no weights to save."""


def sim_source(num_train: int, num_eval: int, seed: int) -> PromptSource:
    """Questions "0*2=", "1*2=", ...: double the number. The held-out ones follow after those of the training."""
    questions = [Question(content=f"{number}*2=", answer=str(2 * number)) for number in range(num_train + num_eval)]
    split = Split(train=tuple(questions[:num_train]), held_out=tuple(questions[num_train:]))
    return PromptSource(LoadedData(name="sim", split=split), seed=seed, max_requeues=3)


def doubled(prompt_token_ids: Sequence[int]) -> list[int]:
    """The right answer to a question of ``sim_source``, as tokens; what is left of it where it has begun, and its end
    where it has begun wrong."""
    question, _, said = "".join(map(chr, prompt_token_ids)).partition("=")
    right = str(2 * int(question.split("*")[0]))
    rest = right[len(said) :] if right.startswith(said) else ""
    return [*map(ord, rest), CharTokenizer.eos_token_id]


@dataclass(slots=True)
class SimDisk:
    """What outlives a run's process.

    Attributes:
        states: checkpoints, the newest last.
        commits: version and draws of every trained step of the surviving lineage.
    """

    states: list[RunState] = field(default_factory=list)
    commits: list[tuple[Version, tuple[str, ...]]] = field(default_factory=list)

    def resume(self) -> RunState:
        """What the next life of the run goes on from."""
        last = self.commits[-1][0] if self.commits else None
        return gone_on_from(self.states[-1] if self.states else RunState(), last)

    def commit(self, version: Version, draws: Sequence[str]) -> None:
        """Steps that were lost with their weights are taken back by the first one that is trained again."""
        self.commits = [commit for commit in self.commits if commit[0].step < version.step]
        self.commits.append((version, tuple(draws)))


class SimCheckpoints:
    """Takes ``copy_s`` and then ``write_s`` for a checkpoint; one that is broken off leaves nothing."""

    def __init__(self, clock: Clock, disk: SimDisk, copy_s: float, write_s: float) -> None:
        self._clock, self._disk, self._copy_s, self._write_s = clock, disk, copy_s, write_s
        self._begun: RunState | None = None

    async def begin(self, state: RunState) -> None:
        assert self._begun is None, "two checkpoints at once"
        await self._clock.sleep(self._copy_s)
        self._begun = state

    async def finish(self, state: RunState) -> None:
        assert self._begun is state
        try:
            await self._clock.sleep(self._write_s)
            self._disk.states.append(state)
        finally:
            self._begun = None
