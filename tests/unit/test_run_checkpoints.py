import asyncio
from pathlib import Path

import pytest

from rlsys.actors.checkpoint import RunCheckpoints, find_start
from rlsys.checkpoints.store import CheckpointStore
from rlsys.controller.state import RunState
from rlsys.errors import CheckpointDamaged, CheckpointFailed, ConfigError
from rlsys.observe.lineage import CommitLog
from rlsys.records import DropCause, Version
from rlsys.sim.fleet import sim_source
from tests.builders import make_group, make_rollout


class FileLearner:
    """Writes a file in place of weights."""

    async def save_checkpoint(self, folder: str) -> None:
        self.folder = Path(folder)

    async def checkpoint_written(self) -> None:
        self.folder.mkdir()
        (self.folder / "weights").write_text("weights")


def state_at(source, step: int) -> RunState:
    prompt = source.next()
    rollouts = tuple(make_rollout(f"{prompt.group_id}/{member}", [step, step]) for member in range(2))
    group = make_group(0, [[0]])
    group = type(group)(prompt=prompt, rollouts=rollouts)
    return RunState(
        version=Version(incarnation=0, step=step),
        cursor=source.cursor([source.next()]),
        groups=(group,),
        trained=8 * step,
        groups_trained=2 * step,
        dropped={DropCause.TOO_STALE: 3},
        given_up=1,
        filtered=2,
        totals={"wall_s": 2.5, "evals": {"eval_before": 0.25}},
    )


@pytest.fixture
def run(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    log = CommitLog(tmp_path / "commits.jsonl")
    return store, log, tmp_path / "commits.jsonl"


def save(store, log, state, learner=None):
    write(RunCheckpoints(store, learner or FileLearner(), log.sync), state)


def write(checkpoints, state):
    async def both():
        await checkpoints.begin(state)
        await checkpoints.finish(state)

    asyncio.run(both())


def new_source():
    return sim_source(num_train=20, num_eval=2, seed=0)


def test_what_was_saved_is_what_the_next_life_starts_with(run):
    store, log, commits = run
    source = new_source()
    state = state_at(source, 4)
    save(store, log, state)
    start = find_start(store, commits, new_source())
    assert start.state.version == state.version and start.state.cursor == state.cursor
    assert (start.state.trained, start.state.groups_trained, start.state.given_up) == (32, 8, 1)
    assert start.state.filtered == 2
    assert start.state.dropped == {DropCause.TOO_STALE: 3} and start.state.totals == state.totals
    (group,) = start.state.groups
    assert group.prompt == state.groups[0].prompt
    assert [rollout.token_ids_T.tolist() for rollout in group.rollouts] == [
        rollout.token_ids_T.tolist() for rollout in state.groups[0].rollouts
    ]
    assert start.learner is not None and (Path(start.learner) / "weights").read_text() == "weights"


def test_steps_trained_after_the_checkpoint_are_told_as_lost_and_make_a_new_incarnation(run):
    store, log, commits = run
    save(store, log, state_at(new_source(), 4))
    log.write(Version(incarnation=0, step=6), ["a"])
    start = find_start(store, commits, new_source())
    assert start.state.version == Version(incarnation=1, step=4)
    assert "step 4" in start.told[-1] and "up to step 6, is lost" in start.told[-1]


def test_a_damaged_checkpoint_is_told_and_passed_over_for_the_one_before(run):
    store, log, commits = run
    source = new_source()
    save(store, log, state_at(source, 2))
    save(store, log, state_at(source, 4))
    (store._root / "step_4" / "groups.npz").write_bytes(b"damaged")
    start = find_start(store, commits, new_source())
    assert start.state.version.step == 2 and "step_4" in start.told[0]
    (store._root / "step_2" / "state.json").unlink()
    with pytest.raises(CheckpointDamaged, match="step_2"):
        find_start(store, commits, new_source())


def test_without_a_checkpoint_the_run_starts_from_the_beginning_as_another_incarnation_if_it_trained(run):
    store, log, commits = run
    assert find_start(store, commits, new_source()).state == RunState()
    log.write(Version(incarnation=0, step=1), ["a"])
    start = find_start(store, commits, new_source())
    assert start.state.version == Version(incarnation=1, step=0) and start.learner is None


def test_other_data_than_that_of_the_run_is_refused(run):
    store, log, commits = run
    save(store, log, state_at(new_source(), 2))
    with pytest.raises(ConfigError, match="the data of a resumed run"):
        find_start(store, commits, sim_source(num_train=19, num_eval=2, seed=0))


def test_a_checkpoint_that_fails_half_way_leaves_nothing_and_the_one_before_stands(run):
    store, log, commits = run

    class FullDisk(FileLearner):
        async def checkpoint_written(self) -> None:
            await super().checkpoint_written()
            raise CheckpointFailed("no space left")

    source = new_source()
    save(store, log, state_at(source, 2))
    with pytest.raises(CheckpointFailed, match="no space left"):
        save(store, log, state_at(source, 4), FullDisk())
    assert sorted(path.name for path in store._root.iterdir()) == ["step_2"]
    assert find_start(store, commits, new_source()).state.version.step == 2


def test_no_checkpoint_counts_before_the_draws_it_has_trained_are_on_the_disk(run):
    store, log, _ = run

    def refuse() -> None:
        raise OSError("no space left on device")

    with pytest.raises(CheckpointFailed, match="no space left"):
        write(RunCheckpoints(store, FileLearner(), refuse), state_at(new_source(), 2))
    assert store.newest() is None
