"""Law 7: with a deterministic engine the system at ``max_staleness`` 0 equals a plain synchronous loop, bit for bit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlsys.actors.clock import WallClock
from rlsys.algo import ADVANTAGES, CORRECTIONS, POLICY_LOSSES
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.buffer.batching import BatchRule
from rlsys.buffer.replay import ReplayBuffer
from rlsys.config.schema import TrainSection
from rlsys.controller.loops import Loops
from rlsys.controller.parts import Parts
from rlsys.controller.plan import Plan
from rlsys.controller.state import RunState
from rlsys.prompts.source import SourceCounts
from rlsys.records import Draw, LoadReport, Probe, Prompt, StepReport, StopReason, Turn, Version, WeightVersion
from rlsys.rollout.play import PlaySpec
from rlsys.sim.fleet import SimCheckpoints, SimDisk, SimFleet, SimMachines
from rlsys.sim.world import RecordingSink
from rlsys.train.learner import LearnerRank
from rlsys.train.objective import Objective
from rlsys.weights.pool import SegmentPool
from tests.laws import synchronous_reference as reference
from tests.laws.learner_ranks import make_model

STEPS, PROMPTS, GROUP, NUM_TOKENS, LR, SEED = 3, 3, 4, 6, 1e-3, 7
RULE = BatchRule(by="prompts", prompts=PROMPTS)
QUESTIONS = [f"{index:04d}" for index in range(STEPS * PROMPTS)]


def reward_of(token_ids: Sequence[int]) -> float:
    return sum(token_id % 2 for token_id in token_ids) / len(token_ids)


def no_other_engine(name):
    raise AssertionError("the engine of the start is never replaced")


class OwnForwardEngine:
    """Samples by the learner's own forward: the weights it serves are the learner's, whatever is published."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.version: Version | None = None

    async def start(self) -> None: ...

    async def generate(self, request) -> Turn:
        assert self.version is not None
        token_ids, logprobs = reference.sample(self._model, request.token_ids, request.max_tokens, request.seed)
        return Turn(
            token_ids_T=np.array(token_ids, dtype=np.int32),
            behaviour_logprobs_T=np.array(logprobs, dtype=np.float32),
            versions_T=np.full(len(token_ids), self.version.code, dtype=np.int64),
            stop_reason=StopReason.LENGTH,
        )

    async def load_weights(self, weights: WeightVersion) -> LoadReport:
        self.version = weights.version
        return LoadReport(engine="own", version=weights.version, pause_s=0.0, total_s=0.0, probe_difference=0.0)

    async def interrupt(self) -> None: ...

    async def stop(self) -> None: ...


class OwnLearner:
    def __init__(self, rank: LearnerRank) -> None:
        self._rank = rank
        self.losses: list[float] = []

    async def step(self, batch) -> StepReport:
        share = batch.for_rank(0)
        metrics = self._rank.step(share)
        self.losses.append(metrics["actor/pg_loss"])
        return StepReport(version=share.version.next(), metrics=metrics)

    async def export(self, segment: str, version: Version) -> WeightVersion:
        nothing = Probe(token_ids=(), logprobs=())
        return WeightVersion(version=version, segment=segment, tensors=(), probe=nothing, previous_probe=None)

    async def save(self, folder: str) -> None: ...


class FixedSource:
    def __init__(self) -> None:
        self._index = -1

    def next(self) -> Prompt:
        self._index += 1
        return Prompt(draw=Draw(source="law", index=self._index, epoch=0), content=QUESTIONS[self._index])

    def requeue(self, prompt: Prompt) -> bool:
        raise AssertionError(f"{prompt.group_id} was lost")

    def counts(self) -> SourceCounts:
        return SourceCounts(drawn=self._index + 1, waiting=0)

    def cursor(self, unfinished: Sequence[Prompt]) -> dict[str, int]:
        assert not unfinished
        return {"index": self._index}

    def restore(self, cursor) -> None:
        raise AssertionError("nothing was saved")

    def eval_prompts(self) -> list[Prompt]:
        return [Prompt(draw=Draw(source="law-eval", index=0, epoch=0), content="9999")]


class ParityScorer:
    async def score(self, group):
        answers = [rollout.token_ids_T[rollout.num_prompt_tokens :].tolist() for rollout in group.rollouts]
        pairs = zip(group.rollouts, answers, strict=True)
        return replace(group, rollouts=tuple(replace(rollout, reward=reward_of(answer)) for rollout, answer in pairs))


def run_system(rank: LearnerRank) -> tuple[OwnLearner, Loops]:
    length = len(QUESTIONS[0]) + NUM_TOKENS
    learner, clock = OwnLearner(rank), WallClock()

    def make_batch(groups, step):
        return pack(
            build(groups, advantage=ADVANTAGES["grpo"], oldest_step=None, correct_at=1.0),
            ranks=1,
            steps_per_batch=1,
            tokens_per_microbatch=length,
            pad_token_id=0,
            version=Version(incarnation=0, step=step),
        )

    disk = SimDisk()
    plan = Plan(
        steps=STEPS,
        batch=RULE,
        max_staleness=0,
        age_policy="drop",
        oversample=0.0,
        slots=PROMPTS * GROUP,
        replicas=1,
        min_compared=2,
        max_retries=3,
        update_share=1.0,
        recomputes=True,
        spec=PlaySpec(group_size=GROUP, temperature=1.0, max_tokens=NUM_TOKENS, seed=SEED),
        checkpoint_every_steps=0,
        eval_every_steps=0,
        pass_samples=0,
        pass_at=(),
        correct_at=1.0,
        rollouts_logged=0,
        start_timeout_s=60.0,
        play_timeout_s=60.0,
        score_timeout_s=60.0,
        step_timeout_s=60.0,
        stall_s=120.0,
        engine_cores=1.0,
        trainer_cores=1.0,
    )
    fleet = SimFleet({"own": OwnForwardEngine(rank._policy.module)}, clock)
    parts = Parts(
        source=FixedSource(),
        fleet=fleet,
        machines=SimMachines(fleet, {}, clock, new_engine=no_other_engine, start_s=0.0),
        scorer=ParityScorer(),
        grader=ParityScorer(),
        select=lambda group: group,
        buffer=SimpleNamespace(),
        learner=learner,
        make_batch=make_batch,
        segments=SegmentPool(["a", "b"]),
        checkpoints=SimCheckpoints(clock, disk, copy_s=0.0, write_s=0.0),
        sink=RecordingSink(disk),
        clock=clock,
    )

    async def main() -> Loops:
        buffer = ReplayBuffer(max_staleness=0, age_policy="drop", batch=RULE)
        loops = Loops(replace(parts, buffer=buffer), plan, RunState())
        await loops.run()
        return loops

    return learner, asyncio.run(main())


@pytest.fixture
def rank(tmp_path):
    torch.set_num_threads(1)
    folder = make_model(tmp_path / "model")
    rank = LearnerRank(
        model_path=folder,
        train=TrainSection(lr=LR, max_grad_norm=0.0),
        temperature=1.0,
        objective=Objective(loss=POLICY_LOSSES["ppo_clip"], correction=partial(CORRECTIONS["tis"], cap=reference.CAP)),
        seed=SEED,
        threads=1,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank.start(0, 1, "127.0.0.1", port)
    yield rank
    rank.stop()


def test_staleness_zero_equals_a_plain_synchronous_loop_bit_for_bit(rank, tmp_path):
    losses, weights = reference.train(
        str(tmp_path / "model"),
        [[ord(character) for character in question] for question in QUESTIONS],
        reward_of,
        steps=STEPS,
        prompts_per_batch=PROMPTS,
        group_size=GROUP,
        num_tokens=NUM_TOKENS,
        lr=LR,
        seed=SEED,
    )
    before = {name: tensor.clone() for name, tensor in rank._policy.module.state_dict().items()}
    learner, loops = run_system(rank)
    assert loops.ledger.trained == STEPS * PROMPTS * GROUP
    after = rank._policy.module.state_dict()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"]), "nothing was trained"
    for name, tensor in weights.items():
        assert torch.equal(after[name], tensor), f"{name}: off by {(after[name] - tensor).abs().max():.3g}"
    assert learner.losses == losses
