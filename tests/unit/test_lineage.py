import json

import pytest

from rlsys.errors import ConfigError, LawBroken
from rlsys.observe.lineage import CommitLog, check_exactly_once, last_version, rewind_metrics
from rlsys.observe.run_folder import RunFolder
from rlsys.records import Version


def commits(path, *lines):
    log = CommitLog(path)
    for version, draws in lines:
        log.write(Version.parse(version), draws)
    log.close()
    return path


def test_a_step_trained_again_takes_back_what_was_trained_from_there_on(tmp_path):
    path = commits(
        tmp_path / "commits.jsonl", ("0.1", ["a"]), ("0.2", ["b"]), ("0.3", ["c"]), ("1.2", ["c"]), ("1.3", ["b"])
    )
    check_exactly_once(path, 3)
    assert last_version(path) == Version(incarnation=1, step=3)


@pytest.mark.parametrize(
    ("lines", "steps", "complaint"),
    [
        ([("0.1", ["a"]), ("0.2", ["b", "a"])], 2, "draw a was trained at step 1 and at step 2"),
        ([("0.1", ["a", "a"])], 1, "draw a was trained at step 1 and at step 1"),
        ([("0.1", ["a"]), ("0.3", ["b"])], 3, r"are \[1, 3\], not 1..3"),
        ([("0.1", ["a"])], 2, r"are \[1\], not 1..2"),
    ],
)
def test_a_draw_trained_twice_or_a_step_left_out_is_a_broken_law(tmp_path, lines, steps, complaint):
    with pytest.raises(LawBroken, match=complaint):
        check_exactly_once(commits(tmp_path / "commits.jsonl", *lines), steps)


def test_a_line_that_a_kill_cut_short_is_none_and_does_not_spoil_the_next(tmp_path):
    path = commits(tmp_path / "commits.jsonl", ("0.1", ["a"]), ("0.2", ["b"]))
    path.write_bytes(path.read_bytes()[:-9])
    assert last_version(path) == Version(incarnation=0, step=1)
    check_exactly_once(commits(path, ("0.2", ["c"])), 2)
    assert [json.loads(line)["draws"] for line in path.read_text().splitlines()] == [["a"], ["c"]]


def test_nothing_on_record_is_no_version_and_no_step(tmp_path):
    assert last_version(tmp_path / "none") is None
    check_exactly_once(tmp_path / "none", 0)


def test_metrics_are_cut_back_to_the_checkpoint_and_the_time_goes_on_from_their_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "version": f"0.{step}", "time_s": 10.0 * step, "x": None} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ti')
    assert rewind_metrics(path, 2) == 30.0
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:2]
    assert rewind_metrics(tmp_path / "none", 2) == 0.0 and not (tmp_path / "none").exists()


def test_a_run_folder_holds_one_process_at_a_time_and_is_free_again_after_it(tmp_path):
    folder = RunFolder(tmp_path, "a")
    with folder.locked():
        with pytest.raises(ConfigError, match="in use by a run that is going on"), RunFolder(tmp_path, "a").locked():
            pass
        with RunFolder(tmp_path, "b").locked():
            pass
    with folder.locked():
        pass
