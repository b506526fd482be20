"""Builds every part of a run from its configuration and wires them together. The only place that knows them all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlsys.actors.algorithm import advantage_of, critic_of, min_compared, needs_of, objective_of, selector_of
from rlsys.actors.buffer import BufferActor, RayBuffer
from rlsys.actors.checkpoint import RunCheckpoints, Start
from rlsys.actors.clock import WallClock
from rlsys.actors.cluster import Place, engine_bundle, engine_name, reserve
from rlsys.actors.inputs import Inputs
from rlsys.actors.learner import LearnerActor, RayLearner
from rlsys.actors.machines import RayMachines
from rlsys.actors.mirror import MirrorActor
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
from rlsys.models.shape import shape_of
from rlsys.observe.sink import RunSink
from rlsys.records import RolloutGroup, Version
from rlsys.reward.load import is_async_reward, load_reward
from rlsys.reward.pool import GRACE_S, RESTART_TIMEOUT_S, RewardPool
from rlsys.rollout.play import PlaySpec
from rlsys.rollout.teacher import GRACE_S as TEACHER_GRACE_S
from rlsys.rollout.teacher import TaughtScorer, TeacherSettings, teacher_environment
from rlsys.rollout.vllm_settings import VllmSettings, engine_environment, num_workers
from rlsys.weights.channel import IPC, NATIVE, check_reach
from rlsys.weights.pool import SegmentPool

SPARE_CALLS = 16  # of a rollout actor, beside its rollouts
AHEAD_SHARE, MOST_AHEAD = 0.5, 16  # of an engine's slots: so many more rollouts wait inside it


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A run, ready to go."""

    loops: Loops
    learner: RayLearner
    fleet: RayFleet
    teacher: RayTeacher | None


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
    engine_places, other_places = await reserve(config)
    num_elsewhere = sum(place.node != other_places[0].node for place in engine_places)
    check_reach(config.rollout.weight_channel, num_elsewhere)
    fleet = RayFleet()
    learner = _learner(config, inputs, other_places[: config.train.processes], version)
    new_engine = partial(_rollout_actor, config, inputs, rollout_actor)
    machines = _machines(config, fleet, learner, sink, home=other_places[0].node, new_engine=new_engine)
    workers = _reward_workers(config, inputs)
    buffer = _buffer(config, home=other_places[0].node)
    teacher = _teacher(config, inputs, other_places[-1])
    workers_ready = asyncio.gather(*(worker.ready() for worker in workers))
    engines = {engine_name(number): place for number, place in enumerate(engine_places)}
    engines_up = asyncio.gather(*(machines.wake(name, place) for name, place in engines.items()))
    actors, *_ = await asyncio.gather(
        within(config.rollout.start_timeout_s, "the rollout engines to start", engines_up),
        within(config.train.start_timeout_s, "the learner to start", learner.start(config.run.seed, start.learner)),
        within(config.train.start_timeout_s, "the reward workers to start", workers_ready),
        *([within(config.rollout.start_timeout_s, "the teacher to start", teacher.start())] if teacher else []),
    )
    segments = await learner.segments(config.run.name)
    for (name, place), actor in zip(engines.items(), actors, strict=True):
        await within(config.rollout.start_timeout_s, f"a way to {name}", machines.admit(name, actor, place))
    rewards = RewardPool(
        workers,
        timeout_s=config.reward.timeout_s,
        max_drops_in_a_row=config.reward.max_drops_in_a_row,
        is_async=is_async_reward(load_reward(inputs.reward_path)),
    )
    parts = Parts(
        source=inputs.source,
        fleet=fleet,
        machines=machines,
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


def _buffer(config: Config, *, home: str) -> RayBuffer:
    """On the learner's machine: the one that the run does not outlive anyway."""
    actor = _actor(BufferActor, "buffer", cpus=0, place=NodeAffinitySchedulingStrategy(node_id=home, soft=False))
    return RayBuffer(
        actor.remote(
            max_staleness=config.rollout.max_staleness,
            age_policy=config.rollout.age_policy,
            batch=_batch_rule(config),
            min_compared=min_compared(config),
        )
    )


def _machines(
    config: Config,
    fleet: RayFleet,
    learner: RayLearner,
    sink: RunSink,
    *,
    home: str,
    new_engine: Callable[[str, Place], Any],
) -> RayMachines:
    return RayMachines(
        fleet,
        learner,
        sink,
        home=home,
        weight_channel=config.rollout.weight_channel,
        bundle=engine_bundle(config),
        run=config.run.name,
        new_engine=new_engine,
        new_mirror=lambda place: _actor(MirrorActor, None, cpus=0, place=place).remote(),
    )


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
        slots=rollouts_in_hand(rollout.slots, rollout.update_mode),
        replicas=rollout.num_replicas,
        spec=spec,
        min_compared=min_compared(config),
        checkpoint_every_steps=config.checkpoint.every_steps,
        eval_every_steps=config.eval.every_steps,
        pass_samples=config.eval.samples,
        pass_at=config.eval.pass_at,
        correct_at=reward.correct_at,
        rollouts_logged=config.observe.rollouts_per_step,
        start_timeout_s=rollout.start_timeout_s,
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
        trainer_cores=train.processes * (train.gpus_per_rank if is_gpu else train.cpus_per_rank),
    )


def rollouts_in_hand(slots: int, update_mode: str) -> int:
    """How many rollouts an engine is given at once: more than it has slots, so that one that ends is followed by the
    next one in the same step of the engine, and not after the way to the controller and back. None in advance in
    ``drain``, where a swap would wait for these, too, and in ``keep``, where they would sit in the room of the probe
    when it is asked: only ``recompute`` lines all requests up again, the probe before them.

    Example:
        >>> [rollouts_in_hand(24, mode) for mode in ("recompute", "keep", "drain")]
        [36, 24, 24]
    """
    return slots + min(MOST_AHEAD, int(AHEAD_SHARE * slots)) if update_mode == "recompute" else slots


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
        cost=shape_of(inputs.model_path).token_cost,
    )


def engine_settings(config: Config, inputs: Inputs, number: int) -> VllmSettings:
    """Of the engine of this number; their seeds differ."""
    rollout = config.rollout
    return VllmSettings(
        model=inputs.model_path,
        dtype=config.model.dtype,
        max_model_len=inputs.longest_prompt + rollout.max_tokens,
        slots=rollout.slots,
        seed=config.run.seed + number,
        start_timeout_s=rollout.start_timeout_s,
        timeout_s=rollout.timeout_s,
        vllm=rollout.vllm,
        update_mode=rollout.update_mode,
        adapter=inputs.adapter_room,
        weight_backend=rollout.weight_channel if rollout.weight_channel in NATIVE else None,
    )


def _rollout_actor(config: Config, inputs: Inputs, rollout_actor: type[RolloutActor], name: str, place: Place) -> Any:
    rollout = config.rollout
    settings = engine_settings(config, inputs, int(name.rpartition("-")[2]))
    actor = _actor(
        rollout_actor,
        name,
        cpus=rollout.cpus_per_replica,
        gpus=rollout.gpus_per_replica,
        environment=engine_environment(
            cpus=rollout.cpus_per_replica,
            gpus=rollout.gpus_per_replica,
            workers=num_workers(rollout.vllm),
            takes_handles=rollout.weight_channel == IPC,
        ),
        place=place.strategy,
        # one call per rollout; a weight swap must never queue behind them
        max_concurrency=rollout.slots + SPARE_CALLS,
    )
    return actor.remote(name, settings)


def _learner(config: Config, inputs: Inputs, places: Sequence[Place], version: Version) -> RayLearner:
    train = config.train
    arguments = {
        "model_path": inputs.model_path,
        "train": train,
        "temperature": config.rollout.temperature,
        "objective": objective_of(config),
        "critic": critic_of(config, inputs.critic_path or inputs.model_path),
        "batches": config.run.steps,
        "seed": config.run.seed,
    }
    environment = {"OMP_NUM_THREADS": str(max(1, int(train.cpus_per_rank))), "TOKENIZERS_PARALLELISM": "false"}
    actors = [
        _actor(
            LearnerActor,
            f"learner-{rank}",
            cpus=train.cpus_per_rank,
            gpus=train.gpus_per_rank,
            environment=environment,
            place=place.strategy,
        ).remote(rank, arguments, config.model.dtype, inputs.adapter_room is not None)
        for rank, place in enumerate(places)
    ]
    return RayLearner(actors, version, processes=train.processes // train.ranks)


def _reward_workers(config: Config, inputs: Inputs) -> list[RayRewardWorker]:
    def create(name: str) -> Any:
        actor = _actor(RewardActor, None, cpus=0, environment={"OMP_NUM_THREADS": "1"})
        return actor.remote(name, inputs.reward_path, config.reward.timeout_s)

    return [
        RayRewardWorker(f"reward-{index}", partial(create, f"reward-{index}")) for index in range(config.reward.workers)
    ]


def _teacher(config: Config, inputs: Inputs, place: Place) -> RayTeacher | None:
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
        place=place.strategy,
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
