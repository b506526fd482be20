"""Laws 1 and 8 over random worlds: every rollout is accounted for at every moment, and no run waits for ever."""

from __future__ import annotations

from collections import Counter
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.selection import overlong, roc, zero_variance
from rlsys.algo.shaping import overlong_penalty
from rlsys.buffer.staleness import staleness_of
from rlsys.controller.ledger import Stage
from rlsys.controller.loops import Loops
from rlsys.errors import FleetLost
from rlsys.sim.fleet import SimFleet
from rlsys.sim.world import MAX_TOKENS, World, simulate
from tests.sim.chance import score_by_chance

ZERO_VARIANCE = (("zero_variance", zero_variance),)
worlds = st.builds(
    World,
    steps=st.integers(1, 6),
    replicas=st.integers(1, 3),
    prompts_per_batch=st.integers(1, 5),
    group_size=st.integers(2, 4),
    max_staleness=st.integers(0, 3),
    age_policy=st.sampled_from(["drop", "mask", "pace"]),
    oversample=st.sampled_from([0.0, 0.0, 0.5]),
    batch_by=st.sampled_from(["prompts", "prompts", "trained_tokens", "sampled_tokens"]),
    tokens_per_batch=st.integers(4 * MAX_TOKENS, 200),
    slots=st.integers(1, 12),
    cached_rollouts=st.none() | st.integers(4, 8),
    num_eval=st.just(2),
    eval_every_steps=st.integers(0, 3),
    seed=st.integers(0, 1000),
    tokens_per_s=st.sampled_from([1.0, 5.0, 50.0]),
    score_s=st.sampled_from([0.0, 0.3]),
    step_s=st.sampled_from([0.05, 1.0, 4.0]),
    export_s=st.sampled_from([0.0, 0.5]),
    write_s=st.sampled_from([0.0, 0.3, 9.0]),
    crashes=st.dictionaries(st.integers(0, 2), st.floats(0.0, 60.0), max_size=2),
    greedy_baseline=st.booleans(),
    shaping=st.sampled_from([(), (partial(overlong_penalty, buffer=8),)]),
    selection=st.sampled_from([(), ZERO_VARIANCE, (("overlong", overlong), ("roc", partial(roc, keep=2)))]),
)


def check_at_every_moment(loops: Loops, fleet: SimFleet) -> None:
    """Law 1 whenever a rollout changes its stage, and as the buffer counts it at every publication; law 5 likewise."""
    publish, move, move_group = loops.sync.publish, loops.ledger.move, loops.ledger.move_group

    async def checked(version):
        loops.ledger.check(await loops.parts.buffer.counts())
        return await publish(version)

    def moved(rollout_id, stage):
        move(rollout_id, stage)
        loops.ledger.check()
        loops.ledger.check_draws(loops.parts.source.counts())
        assert loops.ledger.counts()[Stage.RUNNING] <= len(fleet.engines) * loops.plan.slots

    def group_moved(group, stage):
        move_group(group, stage)
        loops.ledger.check()

    loops.sync.publish = checked  # type: ignore[method-assign]
    loops.ledger.move = moved  # type: ignore[method-assign]
    loops.ledger.move_group = group_moved  # type: ignore[method-assign]
    score_by_chance(50)(loops, fleet)


@settings(max_examples=60, deadline=None)
@given(worlds)
def test_whatever_the_world_every_rollout_is_trained_once_or_dropped_by_name(world):
    crashes = {index: moment_s for index, moment_s in world.crashes.items() if index < world.replicas}
    world = World(**{name: getattr(world, name) for name in World.__slots__} | {"crashes": crashes})
    try:
        report = simulate(world, check_at_every_moment)
    except FleetLost:
        assert len(crashes) == world.replicas
        return
    ledger = report.loops.ledger
    assert ledger.submitted == ledger.trained + ledger.dropped.total() + ledger.lead
    assert ledger.trained == sum(len(group.rollouts) for _, groups in report.trained for group in groups)
    source = report.loops.parts.source.counts()
    standing = ledger.num_groups
    assert source.drawn == ledger.groups_trained + ledger.filtered + ledger.given_up + source.waiting + standing
    assert len(report.trained) == world.steps
    draws = Counter(group.prompt.draw for _, groups in report.trained for group in groups)
    assert set(draws.values()) == {1}
    if world.batch_by == "prompts":
        assert len(draws) == world.steps * world.prompts_per_batch
        assert ledger.lead == 0 or world.oversample > 0
    if world.age_policy == "drop":
        for step, groups in report.trained:
            assert max(staleness_of(groups, step)) <= world.max_staleness
