"""Builds every part of a run from its configuration and wires them together. The only place that knows them all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlsys.actors.algorithm import advantage_of, critic_of, min_compared, needs_of, objective_of, selector_of
from rlsys.actors.buffer import BufferActor, RayBuffer
from rlsys.actors.checkpoint import RunCheckpoints, Start
from rlsys.actors.clock import WallClock
from rlsys.actors.cluster import reserve
from rlsys.actors.inputs import Inputs
from rlsys.actors.learner import LearnerActor, RayLearner
from rlsys.actors.mirror import MirrorActor, NodeMirror
from rlsys.actors.remote import answer
from rlsys.actors.reward import RayRewardWorker, RewardActor
from rlsys.actors.rollout import RayFleet, RolloutActor
from rlsys.actors.teacher import RayTeacher, TeacherActor
from rlsys.algo.rows import Need
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.batch.tensors import Batch
from rlsys.buffer.batching import BatchRule
from rlsys.buffer.staleness import first_trained_step, lead_limit
from rlsys.checkpoints.store import CheckpointStore
from rlsys.config.schema import Config
from rlsys.controller.deadline import within
from rlsys.controller.loops import Loops
from rlsys.controller.parts import Parts
from rlsys.controller.plan import Plan
from rlsys.errors import EngineLost
from rlsys.observe.sink import RunSink
from rlsys.records import RolloutGroup, Version
from rlsys.reward.load import is_async_reward, load_reward
from rlsys.reward.pool import GRACE_S, RESTART_TIMEOUT_S, RewardPool
from rlsys.rollout.play import PlaySpec
from rlsys.rollout.teacher import GRACE_S as TEACHER_GRACE_S
from rlsys.rollout.teacher import TaughtScorer, TeacherSettings, teacher_environment
from rlsys.rollout.vllm_settings import VllmSettings, engine_environment
from rlsys.weights.pool import SegmentPool

SPARE_CALLS = 16  # of a rollout actor, beside its rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A run, ready to go."""

    loops: Loops
    learner: RayLearner
    fleet: RayFleet
    teacher: RayTeacher | None


class _Places:
    """Hands out the reserved places in their order: engines, learner ranks, the teacher."""

    def __init__(self, group: PlacementGroup) -> None:
        self._group, self._indices = group, count()

    def next(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=next(self._indices)
        )


async def build_run(
    config: Config,
    inputs: Inputs,
    sink: RunSink,
    start: Start,
    store: CheckpointStore,
    rollout_actor: type[RolloutActor] = RolloutActor,
) -> Built:
    """Create the actors, wait until every one is up, and hand them to the controller, which goes on from ``start``.

    Raises RlsysError naming the part that did not come up.
    """
    version = start.state.version
    place = _Places(reserve(config))
    fleet = RayFleet(dict(_rollout_actors(config, inputs, place, rollout_actor)))
    learner = RayLearner(_learner_actors(config, inputs, place), version)
    workers = _reward_workers(config, inputs)
    buffer = RayBuffer(
        _actor(BufferActor, "buffer", cpus=0).remote(
            max_staleness=config.rollout.max_staleness,
            age_policy=config.rollout.age_policy,
            batch=_batch_rule(config),
            min_compared=min_compared(config),
        )
    )
    teacher = _teacher(config, inputs, place)
    workers_ready = asyncio.gather(*(worker.ready() for worker in workers))
    await asyncio.gather(
        within(config.rollout.start_timeout_s, "the rollout engines to start", fleet.start()),
        within(config.train.start_timeout_s, "the learner to start", learner.start(config.run.seed, start.learner)),
        within(config.train.start_timeout_s, "the reward workers to start", workers_ready),
        *([within(config.rollout.start_timeout_s, "the teacher to start", teacher.start())] if teacher else []),
    )
    segments = await learner.segments(config.run.name)
    await _reach_other_machines(config, fleet, learner, sink)
    rewards = RewardPool(
        workers,
        timeout_s=config.reward.timeout_s,
        max_drops_in_a_row=config.reward.max_drops_in_a_row,
        is_async=is_async_reward(load_reward(inputs.reward_path)),
    )
    parts = Parts(
        source=inputs.source,
        fleet=fleet,
        scorer=rewards if teacher is None else _taught(config, rewards, teacher),
        grader=rewards,
        select=selector_of(config),
        buffer=buffer,
        learner=learner,
        checkpoints=RunCheckpoints(store, learner, sink.sync_commits),
        make_batch=partial(make_batch, config, inputs, version.incarnation),
        segments=SegmentPool(segments),
        sink=sink,
        clock=WallClock(),
    )
    return Built(loops=Loops(parts, make_plan(config), start.state), learner=learner, fleet=fleet, teacher=teacher)


async def _reach_other_machines(config: Config, fleet: RayFleet, learner: RayLearner, sink: RunSink) -> None:
    """Engines on the learner's machine read its segments; for those of every other machine there is a mirror there."""
    home, engines_at = await learner.node(), await fleet.nodes()
    others = [node for node in engines_at if node != home]
    if not others:
        return
    source = await learner.serve_segments()
    for node in others:
        place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        name = f"weight mirror on {node[:8]}"
        actor = _actor(MirrorActor, None, cpus=0, place=place).remote()
        paths = await within(
            config.rollout.start_timeout_s, name, answer(actor.segments.remote(config.run.name), name, EngineLost)
        )
        fleet.load_through(engines_at[node], NodeMirror(name, actor, paths, source))
        sink.event(f"{', '.join(engines_at[node])}: on another machine than the learner; weights go there over TCP")


def make_plan(config: Config) -> Plan:
    rollout, train, reward = config.rollout, config.train, config.reward
    spec = PlaySpec(
        group_size=rollout.group_size,
        temperature=rollout.temperature,
        max_tokens=rollout.max_tokens,
        seed=config.run.seed,
        greedy_baseline=Need.GREEDY_ROLLOUT in needs_of(config),
    )
    # at worst a group waits until the pool has scored everything else that may stand, each member once with the others
    # and once alone, with a restart after each call
    lead = lead_limit(
        max_staleness=rollout.max_staleness, batch_rollouts=config.rollouts_per_batch, oversample=rollout.oversample
    )
    is_gpu = rollout.gpus_per_replica > 0 or train.gpus_per_rank > 0
    one_group_s = (spec.num_members + 1) * (2 * reward.timeout_s + GRACE_S + RESTART_TIMEOUT_S)
    return Plan(
        steps=config.run.steps,
        batch=_batch_rule(config),
        max_staleness=rollout.max_staleness,
        age_policy=rollout.age_policy,
        oversample=rollout.oversample,
        slots=rollout.slots,
        spec=spec,
        min_compared=min_compared(config),
        checkpoint_every_steps=config.checkpoint.every_steps,
        eval_every_steps=config.eval.every_steps,
        pass_samples=config.eval.samples,
        pass_at=config.eval.pass_at,
        correct_at=reward.correct_at,
        rollouts_logged=config.observe.rollouts_per_step,
        play_timeout_s=rollout.timeout_s,
        score_timeout_s=max(
            one_group_s * (1 + lead / rollout.group_size / reward.workers),
            (rollout.timeout_s + TEACHER_GRACE_S) * (1 + lead / config.teacher.slots),  # no less where there is none
        ),
        max_retries=config.data.max_requeues,
        update_share=rollout.update_share,
        recomputes=rollout.update_mode == "recompute",
        stall_s=rollout.timeout_s
        + max(one_group_s, (rollout.timeout_s + TEACHER_GRACE_S) * (1 + spec.num_members / config.teacher.slots)),
        step_timeout_s=train.timeout_s,
        engine_cores=rollout.gpus_per_replica if is_gpu else rollout.cpus_per_replica,
        trainer_cores=train.ranks * (train.gpus_per_rank if is_gpu else train.cpus_per_rank),
    )


def _batch_rule(config: Config) -> BatchRule:
    train = config.train
    return BatchRule(by=train.batch_by, prompts=train.prompts_per_batch, tokens=train.tokens_per_batch or 0)


def make_batch(config: Config, inputs: Inputs, incarnation: int, groups: Sequence[RolloutGroup], step: int) -> Batch:
    """Advantages, then microbatches: what the learner is handed to train ``step``."""
    oldest = first_trained_step(
        step=step, max_staleness=config.rollout.max_staleness, age_policy=config.rollout.age_policy
    )
    samples = build(
        groups, advantage=advantage_of(config), oldest_step=oldest or None, correct_at=config.reward.correct_at
    )
    return pack(
        samples,
        ranks=config.train.ranks,
        steps_per_batch=config.train.steps_per_batch,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        pad_token_id=inputs.pad_token_id,
        version=Version(incarnation=incarnation, step=step),
    )


def _rollout_actors(
    config: Config, inputs: Inputs, place: _Places, rollout_actor: type[RolloutActor]
) -> list[tuple[str, Any]]:
    rollout = config.rollout
    environment = engine_environment(cpus=rollout.cpus_per_replica, gpus=rollout.gpus_per_replica)
    actors = []
    for index in range(rollout.replicas):
        name = f"rollout-{index}"
        settings = VllmSettings(
            model=inputs.model_path,
            dtype=config.model.dtype,
            max_model_len=inputs.longest_prompt + rollout.max_tokens,
            slots=rollout.slots,
            seed=config.run.seed + index,
            start_timeout_s=rollout.start_timeout_s,
            timeout_s=rollout.timeout_s,
            vllm=rollout.vllm,
            update_mode=rollout.update_mode,
        )
        actor = _actor(
            rollout_actor,
            name,
            cpus=rollout.cpus_per_replica,
            gpus=rollout.gpus_per_replica,
            environment=environment,
            place=place.next(),
            # one call per rollout; a weight swap must never queue behind them
            max_concurrency=rollout.slots + SPARE_CALLS,
        )
        actors.append((name, actor.remote(name, settings)))
    return actors


def _learner_actors(config: Config, inputs: Inputs, place: _Places) -> list[Any]:
    train = config.train
    arguments = {
        "model_path": inputs.model_path,
        "train": train,
        "temperature": config.rollout.temperature,
        "objective": objective_of(config),
        "critic": critic_of(config, inputs.critic_path or inputs.model_path),
        "seed": config.run.seed,
    }
    environment = {"OMP_NUM_THREADS": str(max(1, int(train.cpus_per_rank))), "TOKENIZERS_PARALLELISM": "false"}
    return [
        _actor(
            LearnerActor,
            f"learner-{rank}",
            cpus=train.cpus_per_rank,
            gpus=train.gpus_per_rank,
            environment=environment,
            place=place.next(),
        ).remote(rank, arguments, config.model.dtype)
        for rank in range(train.ranks)
    ]


def _reward_workers(config: Config, inputs: Inputs) -> list[RayRewardWorker]:
    def create(name: str) -> Any:
        actor = _actor(RewardActor, None, cpus=0, environment={"OMP_NUM_THREADS": "1"})
        return actor.remote(name, inputs.reward_path, config.reward.timeout_s)

    return [
        RayRewardWorker(f"reward-{index}", partial(create, f"reward-{index}")) for index in range(config.reward.workers)
    ]


def _teacher(config: Config, inputs: Inputs, place: _Places) -> RayTeacher | None:
    rollout, teacher = config.rollout, config.teacher
    if inputs.teacher_path is None:
        return None
    settings = TeacherSettings(
        model=inputs.teacher_path,
        dtype=config.model.dtype,
        top_k=teacher.top_k,
        max_tokens=inputs.longest_prompt + rollout.max_tokens,
        slots=teacher.slots,
        start_timeout_s=rollout.start_timeout_s,
        timeout_s=rollout.timeout_s,
        vllm=teacher.vllm,
    )
    actor = _actor(
        TeacherActor,
        "teacher",
        cpus=teacher.cpus,
        gpus=teacher.gpus,
        environment=teacher_environment(cpus=teacher.cpus, gpus=teacher.gpus),
        place=place.next(),
        max_concurrency=teacher.slots + SPARE_CALLS,
    )
    return RayTeacher("teacher", actor.remote("teacher", settings, inputs.model_path))


def _taught(config: Config, rewards: RewardPool, teacher: RayTeacher) -> TaughtScorer:
    return TaughtScorer(rewards, teacher, slots=config.teacher.slots, timeout_s=config.rollout.timeout_s)


def _actor(
    cls: type,
    name: str | None,
    *,
    cpus: float,
    gpus: float = 0.0,
    environment: dict[str, str] | None = None,
    place: PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy | None = None,
    max_concurrency: int | None = None,
) -> Any:
    """A Ray actor class with its resources. A name of None is for actors that are replaced under the same name, which
    Ray frees too late; their repr still tells what they are."""
    options: dict[str, Any] = {"name": name, "num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0}
    if place is not None:
        options["scheduling_strategy"] = place
    if max_concurrency is not None:
        options["max_concurrency"] = max_concurrency
    return ray.remote(cls).options(runtime_env={"env_vars": environment or {}}, **options)
