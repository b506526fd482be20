"""A run that is killed in its training leaves nothing behind, and resumed it loses and repeats no draw (law 5)."""

from __future__ import annotations

import pytest

from rlsys.checkpoints.store import CheckpointStore
from rlsys.observe.lineage import last_version
from tests.chaos.kill_and_resume import END_WITHIN_S, EVERY_STEPS, finish, kill_in_a_save, make_run

pytestmark = pytest.mark.engines


def test_a_driver_killed_in_a_save_takes_everything_with_it_and_the_resumed_run_trains_every_draw_once(tmp_path, model):
    run = make_run(tmp_path, "killed", str(model))
    step = kill_in_a_save(run, after=EVERY_STEPS)
    # what is half there does not count, though the training went on
    found = CheckpointStore(run.folder / "checkpoints", keep=2).newest()
    assert found is not None and found.step == step - EVERY_STEPS
    trained = last_version(run.folder / "commits.jsonl")
    assert trained is not None and trained.step >= step
    # the learner is laid out anew, and its checkpoint converted for that
    finish(run, "train.zero_stage=1")
    output = run.output.read_text()
    assert f"going on from the checkpoint of step {found.step}" in output
    assert "train.zero_stage=0: converting it for train.zero_stage=1" in output
    assert not list((run.folder / "checkpoints").glob(".*"))
    # once more on a finished run: nothing is done
    driver = run.start("train.zero_stage=1")
    assert driver.wait(END_WITHIN_S) == 0
    assert "nothing to do" in run.output.read_text()
