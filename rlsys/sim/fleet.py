"""Simulated rollout workers and learner: the same contracts as the real ones, on virtual time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlsys.envs.single_turn import SingleTurn
from rlsys.records import Draw, LoadReport, Probe, Prompt, RolloutGroup, StepReport, Version, WeightVersion
from rlsys.rollout.clock import Clock
from rlsys.rollout.engine import Engine
from rlsys.rollout.play import PlaySpec, play_group

VOCAB_SIZE = 128  # the characters of ASCII


class CharTokenizer:
    """A token per character; 0 ends an answer."""

    chat_template = None
    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % VOCAB_SIZE for character in text]}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token_id) for token_id in token_ids if token_id or not skip_special_tokens)


class SimFleet:
    """Engines in this process."""

    def __init__(self, engines: Mapping[str, Engine], clock: Clock) -> None:
        self.engines = dict(engines)
        self._clock = clock
        self._tokenizer = CharTokenizer()

    def names(self) -> Sequence[str]:
        return tuple(self.engines)

    async def play(self, engine: str, prompt: Prompt, spec: PlaySpec) -> RolloutGroup:
        return await play_group(
            prompt,
            spec,
            engine=self.engines[engine],
            engine_name=engine,
            make_env=SingleTurn,
            tokenizer=self._tokenizer,
            clock=self._clock,
        )

    async def load(self, engine: str, weights: WeightVersion) -> LoadReport:
        return await self.engines[engine].load_weights(weights)

    async def remove(self, engine: str) -> None:
        await self.engines[engine].stop()


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


class SimSource:
    """Questions 0, 1, 2, ...: double the number."""

    def __init__(self, num_eval: int, max_requeues: int = 3) -> None:
        self._next = 0
        self._num_eval, self._max_requeues = num_eval, max_requeues
        self._again: list[Prompt] = []

    def next(self) -> Prompt:
        if self._again:
            return self._again.pop(0)
        self._next += 1
        return self._question("sim", self._next - 1)

    def requeue(self, prompt: Prompt) -> bool:
        if prompt.attempt >= self._max_requeues:
            return False
        self._again.append(replace(prompt, attempt=prompt.attempt + 1))
        return True

    def eval_prompts(self) -> Sequence[Prompt]:
        return [self._question("sim-eval", index) for index in range(self._num_eval)]

    def _question(self, source: str, index: int) -> Prompt:
        return Prompt(draw=Draw(source=source, index=index, epoch=0), content=f"{index}*2=", answer=str(2 * index))


def doubled(prompt_token_ids: Sequence[int]) -> list[int]:
    """The right answer to a question of ``SimSource``, as tokens."""
    number = int("".join(map(chr, prompt_token_ids)).split("*")[0])
    return [*map(ord, str(2 * number)), CharTokenizer.eos_token_id]
