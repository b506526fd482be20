"""Copies of a state, and the thread that writes them."""

import os
import resource
from collections import OrderedDict

import pytest
import torch

from rlsys.train.snapshot import BackgroundWriter, CheckpointTaker, HostMemory, Snapshot

DEADLINE_S = 30.0


@pytest.fixture
def state():
    weight = torch.arange(6.0)
    module = OrderedDict(a=weight, tied=weight, row=weight[2:4], half=torch.ones(3, dtype=torch.bfloat16))
    module._metadata = {"version": 1}
    groups = [{"lr": 0.1, "betas": (0.9, 0.95)}]
    return {"module": module, "groups": groups, "step": torch.tensor(3.0), "empty": torch.zeros(0)}


def test_a_copy_is_of_the_moment_and_keeps_what_shares_memory(state):
    copied = HostMemory().copy(state)
    state["module"]["a"].zero_()
    state["groups"][0]["lr"] = 0.2
    module = copied["module"]
    assert module["a"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and module["row"].tolist() == [2.0, 3.0]
    assert module["half"].dtype == torch.bfloat16 and module["half"].tolist() == [1.0, 1.0, 1.0]
    assert copied["groups"] == [{"lr": 0.1, "betas": (0.9, 0.95)}] and copied["step"] == 3.0
    assert copied["empty"].numel() == 0
    assert module["a"].data_ptr() == module["tied"].data_ptr() == module["row"].data_ptr() - 8
    assert type(module) is OrderedDict and module._metadata == {"version": 1}


def test_the_next_copy_takes_the_same_memory(state):
    memory = HostMemory()
    first = memory.copy(state)
    place = first["module"]["a"].data_ptr()
    state["module"]["a"].add_(1.0)
    memory.rewind()
    second = memory.copy(state)
    assert second["module"]["a"].data_ptr() == place and second["module"]["a"][0] == 1.0


def test_a_state_that_has_grown_is_copied_whole(state):
    memory = HostMemory()
    memory.copy(state)
    memory.rewind()
    state["module"] = {"a": torch.arange(100.0)}
    assert memory.copy(state)["module"]["a"].tolist() == list(range(100))


def test_files_are_written_beside_what_goes_on(tmp_path):
    writer, memory, snapshot = BackgroundWriter(), HostMemory(), Snapshot()
    weights = torch.ones(1000)
    taker = CheckpointTaker(None, memory, snapshot)
    taker.makedirs(str(tmp_path / "deep" / "er"), exist_ok=True)
    taker.save({"weights": weights}, str(tmp_path / "deep" / "er" / "state.pt"))
    snapshot.texts[tmp_path / "deep" / "layout.json"] = "{}"
    assert list(tmp_path.iterdir()) == [], "nothing is touched before it is written"
    weights.zero_()
    writer.write([snapshot])
    written = writer.written(DEADLINE_S)
    assert written is not None and written.failure == "" and written.seconds > 0.0
    assert torch.load(tmp_path / "deep" / "er" / "state.pt")["weights"].sum() == 1000.0
    assert (tmp_path / "deep" / "layout.json").read_text() == "{}"


def test_a_full_disk_is_told_as_what_it_is(tmp_path):
    writer, snapshot = BackgroundWriter(), Snapshot(files=[(tmp_path / "state.pt", torch.ones(10_000))])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        writer.write([snapshot])
        written = writer.written(DEADLINE_S)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert written is not None and "File too large" in written.failure
    writer.write([snapshot])
    assert (again := writer.written(DEADLINE_S)) is not None and again.failure == ""


def test_a_copy_that_failed_is_told_and_nothing_is_written(tmp_path):
    class NoMemory:
        def copy(self, state):
            raise RuntimeError("can't allocate memory")

    snapshot = Snapshot(texts={tmp_path / "layout.json": "{}"})
    CheckpointTaker(None, NoMemory(), snapshot).save({}, str(tmp_path / "state.pt"))
    writer = BackgroundWriter()
    writer.write([snapshot])
    written = writer.written(DEADLINE_S)
    assert written is not None and "allocate memory" in written.failure and list(tmp_path.iterdir()) == []


def test_what_is_under_way_is_not_written_yet(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody reads: opening it for writing waits
    writer = BackgroundWriter()
    writer.write([Snapshot(texts={pipe: "text"})])
    assert writer.written() is None and writer.written(0.05) is None
    assert pipe.read_text() == "text"
    written = writer.written(DEADLINE_S)
    assert written is not None and written.failure == ""
