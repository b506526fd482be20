"""What makes a batch, and what becomes of answers that are not finished in time: whole runs on the virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlsys.buffer.batching import sampled_tokens
from rlsys.records import steps_of
from rlsys.sim.world import SimReport, World, simulate
from tests.sim.chance import score_by_chance

SLOW = 20  # times as long as the others take


def one_in(number: int, lengths: tuple[int, int] = (4, 4)):
    """The first member of every ``number``th question takes ``SLOW`` times as long as the others; answers have as many
    tokens as ``lengths`` says, in turn."""

    def disturb(loops, fleet) -> None:
        clock = loops.parts.clock

        def slow(engine):
            generate = engine.generate

            async def generate_slowly(request):
                draw, _, member = request.request_id.partition("#")
                is_slow = draw.startswith("sim:") and int(draw.split(":")[2]) % number == 0
                if is_slow and member == "0/0:0":  # when it is asked again it is quick
                    await clock.sleep((SLOW - 1) * 2.0)
                return await generate(request)

            return generate_slowly

        for engine in fleet.engines.values():
            engine._answer = lambda request, version: [65] * (lengths[sum(request.token_ids) % 2] - 1) + [0]
            engine._tokens_per_s = 2.0
            engine.generate = slow(engine)
        score_by_chance(50)(loops, fleet)

    return disturb


WORLD = World(steps=12, replicas=1, slots=64, prompts_per_batch=4, num_questions=400, step_s=0.5, eval_every_steps=0)


def tokens_by_batch(report: SimReport) -> list[int]:
    return [sum(map(sampled_tokens, groups)) for _, groups in report.trained]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_budget_of_trained_tokens_bounds_every_batch_from_both_sides(max_staleness):
    world = replace(WORLD, max_staleness=max_staleness, batch_by="trained_tokens", tokens_per_batch=100)
    report = simulate(world, one_in(400, lengths=(3, 9)))
    longest_group = world.group_size * 9
    assert all(100 - longest_group < tokens <= 100 for tokens in tokens_by_batch(report))
    assert len({len(groups) for _, groups in report.trained}) > 1, "every batch has as many groups"
    assert report.summary["staleness/max"] <= max_staleness


def test_a_batch_of_sampled_tokens_does_not_wait_for_the_slowest_and_trains_it_later():
    by_prompts = replace(WORLD, max_staleness=0, age_policy="mask")
    by_tokens = replace(WORLD, max_staleness=3, age_policy="pace", batch_by="sampled_tokens", tokens_per_batch=64)
    waiting, going_on = simulate(by_prompts, one_in(8)), simulate(by_tokens, one_in(8))
    assert going_on.virtual_s < 0.5 * waiting.virtual_s
    assert going_on.summary["dropped/stopped"] == going_on.summary["dropped/too_stale"] == 0
    longest = max(rollout.seconds for _, groups in going_on.trained for group in groups for rollout in group.rollouts)
    assert longest > SLOW  # seconds: it was trained in the end


def test_at_staleness_zero_what_is_unfinished_when_the_budget_is_spent_is_stopped_and_asked_again():
    world = replace(WORLD, max_staleness=0, batch_by="sampled_tokens", tokens_per_batch=64)
    report = simulate(world, one_in(8))
    assert report.summary["dropped/stopped"] > 0
    assert report.virtual_s < 12 * 10
    assert all(steps_of(rollout.versions_T)[rollout.loss_mask_T].tolist() == [step] * rollout.num_sampled_tokens
               for step, groups in report.trained for group in groups for rollout in group.rollouts)  # fmt: skip


def test_oversampling_fills_batches_without_their_slowest_answers_and_frees_their_slots():
    running = []

    def watch(loops, fleet) -> None:
        one_in(8)(loops, fleet)
        step = loops.parts.sink.step

        def counted(*arguments):
            running.append(loops.roster.num_running)
            step(*arguments)

        loops.parts.sink.step = counted

    synchronous = simulate(replace(WORLD, max_staleness=0), one_in(8))
    oversampled = simulate(replace(WORLD, max_staleness=0, oversample=0.5), watch)
    assert oversampled.virtual_s < 0.5 * synchronous.virtual_s
    assert oversampled.summary["dropped/stopped"] > 0
    assert {len(groups) for _, groups in oversampled.trained} == {4}
    assert max(running) <= 6 * WORLD.group_size  # one and a half batches: what was stopped runs no more


def test_a_rollout_under_way_is_stopped_as_soon_as_no_batch_can_take_it():
    world = replace(WORLD, max_staleness=1, steps=20)
    report = simulate(world, one_in(8))
    assert report.summary["dropped/stopped"] > 0
    # its group closes with it: the other three had waited for it until they were too old as well
    assert report.summary["dropped/too_stale"] == 3 * report.summary["dropped/stopped"]


@pytest.mark.parametrize("age_policy", ["drop", "mask", "pace"])
def test_every_age_policy_counts_what_it_does_to_old_tokens(age_policy):
    world = World(
        steps=12, replicas=1, max_staleness=1, age_policy=age_policy, tokens_per_s=2.0, step_s=0.2,
        oversample=1.0, eval_every_steps=0, num_questions=200,
    )  # fmt: skip
    report = simulate(world, score_by_chance(50))
    dropped = report.summary["dropped/too_stale"] + report.summary["dropped/stopped"]
    violations = sum(metrics.get("staleness/violations", 0.0) for metrics in report.sink.steps)
    masked = sum(metrics.get("staleness/masked_tokens", 0.0) for metrics in report.sink.steps)
    ages = [
        step - steps_of(rollout.versions_T)[rollout.loss_mask_T].min()
        for step, groups in report.trained
        for group in groups
        for rollout in group.rollouts
    ]
    if age_policy == "drop":
        assert dropped > 0 and violations == masked == 0 and max(ages) <= 1
    elif age_policy == "mask":
        assert masked > 0 and violations == 0 and max(ages) > 1
    else:
        assert violations == sum(age > 1 for age in ages) > 0
        assert dropped == masked == 0
