"""A disk that is full for a while: nothing raises, nothing waits, lines come later, and the person is told once.

A limit on the size of files (RLIMIT_FSIZE) stands for the full disk: writing stops in the middle of a record, as there,
and goes on when the limit is lifted.
"""

from __future__ import annotations

import io
import json
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.errors import RlsysError
from rlsys.observe.append_file import AppendFile
from rlsys.observe.lineage import CommitLog
from rlsys.observe.progress import Progress
from rlsys.observe.run_folder import RunFolder
from rlsys.observe.sink import RunSink
from rlsys.observe.trackers import MetricsFile, TensorBoard, Trackers
from rlsys.records import Version
from tests.unit.test_observe_sink import read_scalars

REFUSED = "File too large"  # what the limit says; a full disk says "No space left on device"


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond ``num_bytes``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_refused_records_wait_in_order_and_no_part_of_one_is_left_behind(tmp_path):
    path = tmp_path / "log"
    file = AppendFile(path)
    with files_up_to(10):
        file.write(b"first\n")
        file.write(b"second\n")  # four bytes of it fit
        file.write(b"3\n")  # it would fit, and must not overtake
        assert path.read_bytes() == b"first\n" and file.num_held == 2
    file.write(b"fourth\n")
    assert path.read_bytes() == b"first\nsecond\n3\nfourth\n"
    assert file.close() == []


def test_the_person_is_told_once_that_writing_fails_and_once_that_it_works_again(tmp_path):
    file = AppendFile(tmp_path / "metrics.jsonl", max_held=2)
    assert file.retry() == []
    with files_up_to(0):
        for number in range(5):
            file.write(b"%d\n" % number)
        [told] = file.retry()
        assert told.startswith(f"metrics.jsonl cannot be written ({REFUSED})") and "the last 2 entries" in told
        assert file.retry() == []
    assert file.retry() == ["metrics.jsonl is written again; 3 entries in all are lost"]
    assert file.retry() == [] and file.num_lost == 3
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"3\n4\n"


def test_a_device_that_is_always_full_raises_nothing_but_on_sync():
    file = AppendFile(Path("/dev/full"))
    file.write(b"line\n")
    with pytest.raises(OSError, match="1 entries of /dev/full are not written"):
        file.sync()
    assert file.close() == ["the last 1 entries of full are not written (No space left on device)"]


@given(
    records=st.lists(st.binary(min_size=1, max_size=8).map(lambda record: record + b"\n"), max_size=12),
    limits=st.lists(st.integers(0, 60), min_size=1, max_size=12),
)
def test_however_the_disk_fills_a_reader_finds_whole_records_in_order_and_in_the_end_all(
    records: list[bytes], limits: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        file = AppendFile(path)
        for index, record in enumerate(records):
            with files_up_to(limits[index % len(limits)]):
                file.write(record)
            written = index + 1 - file.num_held
            assert path.read_bytes() == b"".join(records[:written])
        assert file.close() == []
        assert path.read_bytes() == b"".join(records)


def test_what_another_process_wrote_behind_a_part_stays(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    file = AppendFile(path)
    write = os.write

    def fill_up(fd: int, data: bytes) -> int:
        if not path.read_bytes():
            return write(fd, data[:3])
        with path.open("ab") as other:
            other.write(b"noise\n")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fill_up)
    file.write(b"ours\n")
    monkeypatch.undo()
    file.write(b"next\n")
    assert path.read_bytes() == b"ournoise\nours\nnext\n"


def test_a_full_disk_costs_the_run_no_line_and_is_told_on_the_terminal(tmp_path):
    terminal = io.StringIO()
    sink = RunSink(
        trackers=Trackers([MetricsFile(tmp_path / "metrics.jsonl"), TensorBoard(tmp_path / "board")]),
        progress=Progress(terminal, total_steps=5),
        log=AppendFile(tmp_path / "log.txt"),
        commits=CommitLog(tmp_path / "commits.jsonl"),
    )

    def train(step: int) -> None:
        version = Version(incarnation=0, step=step)
        sink.commit(version, [f"sums:0:{step}"])
        sink.step(step, version, {"critic/score/mean": step / 8})
        sink.live({})

    train(1)
    with files_up_to(0):
        for step in (2, 3, 4):
            train(step)
        sink.event("rollout-1 is out of service")
    train(5)
    sink.close("done")
    for name in ("metrics.jsonl", "commits.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert read_scalars(tmp_path / "board") == [(step, "critic/score/mean", step / 8) for step in range(1, 6)]
    told, log = terminal.getvalue(), (tmp_path / "log.txt").read_text()
    for name in ("metrics.jsonl", "commits.jsonl", "log.txt"):
        assert told.count(f"{name} cannot be written ({REFUSED})") == 1, told
        assert told.count(f"{name} is written again; nothing is lost") == 1
    assert log.count("metrics.jsonl cannot be written") == log.count("rollout-1 is out of service") == 1


def test_tensorboard_never_waits_for_a_full_disk(tmp_path):
    board = TensorBoard(tmp_path / "board")
    with files_up_to(100):
        for step in range(50):
            board.step(step, Version(incarnation=0, step=step), 0.0, {"lag": 1.0})
    assert board.close() == []
    assert read_scalars(tmp_path / "board") == [(step, "lag", 1.0) for step in range(50)]


def test_a_result_that_the_disk_refuses_is_told_whole_and_leaves_no_part(tmp_path):
    folder = RunFolder(tmp_path, "first")
    with files_up_to(10), pytest.raises(RlsysError) as told:
        folder.write_result({"steps": 20, "eval_after": 0.75})
    assert '"eval_after": 0.75' in str(told.value) and REFUSED in str(told.value)
    assert list(folder.path.iterdir()) == []
