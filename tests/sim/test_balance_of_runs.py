"""What simulated runs report of their two sides, and whether the split that follows is the best one."""

import pytest

from rlsys.plan.balance import Side, in_whole_cores
from rlsys.sim.world import SimReport, World, simulate

CORES = 6
STEP_S = 0.6  # of a trainer of one core


def run_with(trainer_cores: int) -> SimReport:
    """The other cores are engines of one core each. A long lead, so that the sides wait for rates and not for luck."""
    return simulate(
        World(
            steps=24,
            step_s=STEP_S / trainer_cores,
            export_s=0.02,
            save_s=0.0,
            write_s=0.0,
            score_s=0.0,
            replicas=CORES - trainer_cores,
            num_questions=500,
            max_staleness=4,
            eval_every_steps=0,
            checkpoint_every_steps=0,
        )
    )


@pytest.fixture(scope="module")
def reports() -> dict[int, SimReport]:
    return {trainer_cores: run_with(trainer_cores) for trainer_cores in range(1, CORES)}


def test_every_step_and_the_result_say_how_the_sides_are_balanced(reports):
    names = {
        "balance/rollouts_made_per_s",
        "balance/rollouts_trained_per_s",
        "balance/rollout_tokens_per_s",
        "balance/trainer_tokens_per_s",
        "balance/trainer_share",
    }
    for report in reports.values():
        assert all(names <= row.keys() for row in (*report.sink.steps, report.summary))


def test_from_whatever_split_the_one_that_is_named_is_the_fastest(reports):
    fastest = max(reports, key=lambda trainer_cores: reports[trainer_cores].summary["rollouts_per_s"])
    for trainer_cores, report in reports.items():
        rollout = Side(rollouts_per_s=report.summary["balance/rollouts_made_per_s"], cores=float(CORES - trainer_cores))
        trainer = Side(rollouts_per_s=report.summary["balance/rollouts_trained_per_s"], cores=float(trainer_cores))
        named = in_whole_cores(rollout, trainer, CORES)
        assert named is not None and named.trainer_cores == fastest
