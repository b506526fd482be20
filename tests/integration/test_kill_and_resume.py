"""A run that is killed in its training leaves nothing behind, and resumed it loses and repeats no draw (law 5)."""

from __future__ import annotations

import random

import pytest

from tests.chaos.kill_and_resume import END_WITHIN_S, finish, kill_once, make_run

pytestmark = pytest.mark.engines


class InTraining(random.Random):
    """The kill falls into the training, two seconds after its begin."""

    def random(self) -> float:
        return 0.0

    def uniform(self, a: float, b: float) -> float:
        return 2.0


def test_a_killed_driver_takes_everything_with_it_and_the_resumed_run_trains_every_draw_once(tmp_path, model):
    run = make_run(tmp_path, "killed", str(model))
    assert kill_once(run, InTraining()) is not None
    finish(run)
    # once more on a finished run: nothing is done
    driver = run.start()
    assert driver.wait(END_WITHIN_S) == 0
    assert "nothing to do" in run.output.read_text()
