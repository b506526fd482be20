"""Whole runs that shape and select, and runs with a greedy baseline: every batch is full, every draw accounted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from rlsys.algo.selection import mean_between, overlong, roc, zero_variance
from rlsys.algo.shaping import overlong_penalty
from rlsys.buffer.staleness import staleness_of
from rlsys.controller.attrition import LOST_GROUPS_IN_A_ROW, MAX_FILTERED_BATCHES
from rlsys.errors import RequestRefused, TooManyDrops
from rlsys.records import DropCause, StopReason
from rlsys.rollout.play import greedy_id
from rlsys.sim.world import SimReport, World, simulate
from tests.sim.chance import score_by_chance

ZERO_VARIANCE = (("zero_variance", zero_variance),)


def run(world: World, *disturbances) -> SimReport:
    """Play ``world``; at every submission the lead is within its limit."""

    def watch(loops, fleet) -> None:
        submit = loops.ledger.submit

        def checked(*arguments):
            submit(*arguments)
            batches = world.max_staleness + 1
            assert loops.ledger.lead <= loops.lead.gauges()["buffer/lead_limit"]
            assert loops.ledger.num_groups <= batches * world.prompts_per_batch

        loops.ledger.submit = checked
        for disturb in disturbances:
            disturb(loops, fleet)

    report = simulate(world, watch)
    check_laws(report, world)
    return report


def check_laws(report: SimReport, world: World) -> None:
    ledger, counts = report.loops.ledger, report.loops.parts.source.counts()
    assert ledger.submitted == ledger.trained + ledger.dropped.total() and ledger.lead == 0
    assert counts.drawn == ledger.groups_trained + ledger.filtered + ledger.given_up + counts.waiting
    assert [step for step, _ in report.trained] == list(range(world.steps))
    for step, groups in report.trained:
        assert len(groups) == world.prompts_per_batch
        ages = staleness_of(groups, step)
        assert min(ages) >= 0 and max(ages) <= world.max_staleness
    draws = Counter(group.prompt.draw for _, groups in report.trained for group in groups)
    assert set(draws.values()) == {1}, "a draw was trained twice"


def trained_groups(report: SimReport):
    return [group for _, groups in report.trained for group in groups]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_other_questions_take_the_place_of_filtered_groups_until_every_batch_is_full(max_staleness):
    world = World(max_staleness=max_staleness, selection=ZERO_VARIANCE)
    report = run(world, score_by_chance(20))  # 0.8^4 + 0.2^4: four in ten groups are alike
    ledger = report.loops.ledger
    assert ledger.filtered > 5 and ledger.given_up == 0
    assert ledger.dropped[DropCause.FILTERED] == world.group_size * ledger.filtered
    # who is overtaken by those who came in for others may be too old when its turn comes
    stale = ledger.dropped.total() - ledger.dropped[DropCause.FILTERED]
    assert stale == ledger.dropped[DropCause.TOO_STALE] + ledger.dropped[DropCause.STOPPED] <= 0.05 * ledger.submitted
    assert all(len(set(group.baseline_rewards)) == 2 for group in trained_groups(report))
    if max_staleness == 0:
        assert stale == 0 and {group.prompt.attempt for group in trained_groups(report)} == {0}
    shares = [metrics["critic/filtered_groups"] for metrics in report.sink.steps]
    assert 0.2 < sum(shares) / len(shares) < 0.6
    assert report.sink.steps[-1]["dropped/filtered"] > 0


def test_a_run_without_selection_filters_nothing_and_scores_are_rewards():
    report = run(World(), score_by_chance(50))
    assert report.loops.ledger.filtered == 0 and not report.loops.ledger.dropped
    for metrics in report.sink.steps:
        assert metrics["critic/filtered_groups"] == 0.0
        assert metrics["critic/score/mean"] == metrics["critic/rewards/mean"]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_an_oversampled_group_is_trained_with_as_many_as_are_kept(max_staleness):
    world = World(group_size=6, max_staleness=max_staleness, selection=(("roc", partial(roc, keep=2)),))
    report = run(world, score_by_chance(50))
    groups = trained_groups(report)
    assert {(len(group.rollouts), len(group.baseline_rewards)) for group in groups} == {(2, 2)}
    dropped = report.loops.ledger.dropped
    assert dropped[DropCause.FILTERED] == 4 * (len(groups) + dropped[DropCause.TOO_STALE] // 2)
    assert dropped[DropCause.TOO_STALE] <= (0.05 if max_staleness else 0.0) * report.loops.ledger.submitted


def test_small_groups_make_no_room_for_groups_that_must_wait_for_a_version_of_their_own_making():
    """In the synchronous run three groups shrink to half while the fourth one is scored, and filtered, late: were their
    rollouts' room given to others, these would wait for the version that lacks the fourth group."""

    def filter_the_last_one_late(loops, fleet):
        score = loops.parts.scorer.score
        seen = []

        async def late(group):
            scored = await score(group)
            if group.prompt.draw.source == "sim":
                seen.append(group)
                if len(seen) == 4:
                    await loops.parts.clock.sleep(5.0)
                    return replace(scored, rollouts=tuple(replace(one, reward=0.0) for one in scored.rollouts))
            return scored

        loops.parts.scorer.score = late

    world = World(steps=2, max_staleness=0, selection=(("roc", partial(roc, keep=2)), *ZERO_VARIANCE))
    report = run(world, score_by_chance(50), filter_the_last_one_late)
    assert report.loops.ledger.filtered > 0


def test_scores_and_shaped_rewards_are_told_apart_in_the_metrics():
    penalty = partial(overlong_penalty, buffer=16, factor=0.5)  # every token costs 0.5 / 16
    report = run(World(shaping=(penalty,), num_questions=60), score_by_chance(50))
    for metrics, groups in zip(report.sink.steps, (groups for _, groups in report.trained), strict=True):
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        lengths = [rollout.num_sampled_tokens for rollout in rollouts]
        taken_off = 0.5 / 16 * sum(lengths) / len(lengths)
        assert metrics["critic/score/max"] == 1.0
        assert metrics["critic/score/mean"] - metrics["critic/rewards/mean"] == pytest.approx(taken_off)


def test_a_group_of_which_one_rollout_is_trained_is_compared_with_all_of_its_rewards():
    def cut_all_but_the_first(loops, fleet):
        score = loops.parts.scorer.score

        async def cut(group):
            scored = await score(group)
            first, *others = scored.rollouts
            return replace(scored, rollouts=(first, *(replace(one, stop_reason=StopReason.LENGTH) for one in others)))

        loops.parts.scorer.score = cut

    report = run(World(selection=(("overlong", overlong),)), score_by_chance(50), cut_all_but_the_first)
    assert {(len(group.rollouts), len(group.baseline_rewards)) for group in trained_groups(report)} == {(1, 4)}


def test_a_run_of_which_every_group_is_filtered_stops_and_names_the_rows_and_the_mean_score():
    world = World(selection=(("mean_between(high=0.9)", partial(mean_between, high=0.9)), *ZERO_VARIANCE))
    limit = max(LOST_GROUPS_IN_A_ROW, MAX_FILTERED_BATCHES * world.prompts_per_batch)
    with pytest.raises(
        TooManyDrops, match=rf"{limit + 1} groups in a row .* \(mean_between\(high=0.9\)\).* score is 1:"
    ):
        simulate(world, score_by_chance(100))
    with pytest.raises(TooManyDrops, match=r"algo.selection \(zero_variance\). Their mean score is 0:"):
        simulate(World(selection=ZERO_VARIANCE), score_by_chance(0))


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_greedy_rollout_is_played_for_every_group_and_is_its_baseline(max_staleness):
    world = World(max_staleness=max_staleness, greedy_baseline=True, slots=5)
    report = run(world, score_by_chance(50))
    groups = trained_groups(report)
    assert report.loops.ledger.dropped == {DropCause.BASELINE: len(groups)}
    for group in groups:
        assert len(group.rollouts) == len(group.baseline_rewards) == world.group_size
        assert group.greedy_reward in (0.0, 1.0)
        assert [member.rollout_id for member in group.dropped] == [greedy_id(group.group_id)]
    assert {group.greedy_reward for group in groups} == {0.0, 1.0}
    assert report.summary["staleness/max"] <= max_staleness


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("lost_by", ["engine", "reward"])
def test_a_group_without_its_greedy_rollout_has_no_baseline_and_is_asked_again(lost_by, max_staleness):
    lost = greedy_id("sim:0:3#0")

    def lose_it(loops, fleet):
        def refusing(generate):
            async def generate_or_not(request):
                if request.request_id.startswith(lost):
                    raise RequestRefused("no")
                return await generate(request)

            return generate_or_not

        async def score(group, given=loops.parts.scorer.score):
            return (await given(group)).drop({lost: DropCause.REWARD_ERROR}, "broken")

        if lost_by == "engine":
            for engine in fleet.engines.values():
                engine.generate = refusing(engine.generate)
        else:
            loops.parts.scorer.score = score

    world = World(max_staleness=max_staleness, greedy_baseline=True)
    report = run(world, lose_it)
    cause = DropCause.ENGINE_REFUSED if lost_by == "engine" else DropCause.REWARD_ERROR
    ledger = report.loops.ledger
    assert ledger.dropped[cause] == 1 and ledger.dropped[DropCause.GROUP_TOO_SMALL] == world.group_size
    again = next(group for group in trained_groups(report) if group.prompt.draw.index == 3)
    assert again.prompt.attempt == 1 and again.greedy_reward is not None


def test_a_single_rollout_can_be_compared_with_the_greedy_one():
    report = run(World(group_size=1, greedy_baseline=True), score_by_chance(50))
    assert {len(group.rollouts) for group in trained_groups(report)} == {1}


def test_what_is_evaluated_is_neither_selected_nor_shaped():
    plain, selecting = (
        simulate(world, score_by_chance(50)).summary for world in (World(), World(selection=ZERO_VARIANCE))
    )
    assert plain["eval_before"] == selecting["eval_before"]
