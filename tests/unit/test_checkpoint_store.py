"""A checkpoint is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from rlsys.checkpoints import store as store_module
from rlsys.checkpoints.store import CheckpointStore, verify
from rlsys.errors import CheckpointDamaged, CheckpointFailed

FILES = {"state.json": b"{}", "learner/weights.pt": bytes(range(256)) * 9, "learner/empty": b""}
KILLED = 99  # exit status of a child that was killed by ``act_and_die``
ACTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "os.scandir")  # audit events of the file system


def fill(folder: Path, step: int, files: Mapping[str, bytes] = FILES) -> None:
    for name, content in {**files, "step": str(step).encode()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def save(store: CheckpointStore, step: int, mark: bytes = b"") -> Path:
    folder = store.begin(step)
    fill(folder, step, {**FILES, "mark": mark})
    return store.commit(step)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def in_a_child(act: Callable[[], object]) -> int:
    """Exit status of a forked process that runs ``act``."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def act_and_die(act: Callable[[], object], after: int) -> int:
    """Run ``act`` in a child that dies right before its ``after``-th act on the file system."""

    def doomed() -> None:
        left = after

        def count(event: str, arguments: object) -> None:
            nonlocal left
            if event in ACTS:
                left -= 1
                if left < 0:
                    os._exit(KILLED)

        sys.addaudithook(count)
        act()

    return in_a_child(doomed)


def test_the_newest_checkpoint_is_found_with_everything_in_it(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    assert store.newest() is None
    for step in (9, 10):
        assert save(store, step) == tmp_path / "run" / "checkpoints" / f"step_{step}"
    found = store.newest()
    assert (found.step, found.path.name, found.damaged) == (10, "step_10", ())
    for name, content in FILES.items():
        assert (found.path / name).read_bytes() == content


def test_the_manifest_names_every_file_with_its_size_and_checksum(tmp_path):
    path = save(CheckpointStore(tmp_path, keep=1), 4)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 4)
    assert sorted(manifest["files"]) == ["learner/empty", "learner/weights.pt", "mark", "state.json", "step"]
    wanted = {"bytes": 2304, "xxh3_64": xxhash.xxh3_64_hexdigest(FILES["learner/weights.pt"])}
    assert manifest["files"]["learner/weights.pt"] == wanted


def test_the_oldest_beyond_keep_are_removed(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step, standing in ((8, ["step_8"]), (9, ["step_8", "step_9"]), (10, ["step_10", "step_9"])):
        save(store, step)
        assert names(tmp_path) == standing


def test_a_checkpoint_of_a_line_that_was_given_up_goes_with_the_next_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30):
        save(store, step)
    (tmp_path / "step_30" / "step").write_bytes(b"x")
    assert store.newest().step == 20
    save(store, 25)
    assert names(tmp_path) == ["step_10", "step_20", "step_25"]


def test_a_second_checkpoint_of_a_step_takes_the_place_of_the_first(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 3, mark=b"first")
    path = save(store, 3, mark=b"second")
    assert names(tmp_path) == ["step_3"]
    assert store.newest().path == path and (path / "mark").read_bytes() == b"second"


def test_what_an_earlier_attempt_left_is_removed_and_nothing_else(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    fill(store.begin(2), 2)
    for left in ("removed", "converted", "converted.partial"):
        (tmp_path / f".step_0.{left}").mkdir()
    (tmp_path / ".step_notes").write_text("mine")
    (tmp_path / "step_notes").mkdir()
    assert store.newest().step == 1
    assert list(store.begin(3).iterdir()) == []
    assert names(tmp_path) == [".step_3.partial", ".step_notes", "step_1", "step_notes"]
    store.abandon(3)
    assert names(tmp_path) == [".step_notes", "step_1", "step_notes"]


def cut_short(path: Path) -> None:
    os.truncate(path / "learner/weights.pt", 2303)


def flip(path: Path) -> None:
    content = bytearray((path / "learner/weights.pt").read_bytes())
    content[1000] ^= 1
    (path / "learner/weights.pt").write_bytes(content)


def remove(path: Path) -> None:
    (path / "learner/empty").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 50)


def make_manifest_a_list(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def change_format(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))


def rename_from_older(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step_5", path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_short, "learner/weights.pt"),
        (flip, "learner/weights.pt"),
        (remove, "learner/empty"),
        (remove_manifest, "manifest.json"),
        (cut_manifest, "manifest.json"),
        (make_manifest_a_list, "manifest.json"),
        (change_format, "format 2"),
        (rename_from_older, "step 5"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path, damage, told):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 6):
        save(store, step)
    damage(tmp_path / "step_6")
    with pytest.raises(CheckpointDamaged, match=told):
        verify(tmp_path / "step_6")
    found = store.newest()
    assert found.step == 5
    (sentence,) = found.damaged
    assert "step_6 is damaged" in sentence and told in sentence


@given(position=st.integers(0, 4000), bit=st.integers(0, 7))
def test_no_flipped_bit_of_any_file_changes_what_is_read(tmp_path_factory, position, bit):
    """Either the checkpoint is refused, or what it names is what was written (a changed blank in the manifest)."""
    root = tmp_path_factory.mktemp("flipped")
    path = save(CheckpointStore(root, keep=1), 5)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    written = {file: file.read_bytes() for file in files}
    manifest = json.loads(written[path / "manifest.json"])
    everything = [(file, index) for file, content in written.items() for index in range(len(content))]
    file, index = everything[position % len(everything)]
    flipped = bytearray(written[file])
    flipped[index] ^= 1 << bit
    file.write_bytes(flipped)
    try:
        verify(path)
    except CheckpointDamaged:
        return
    assert json.loads((path / "manifest.json").read_text()) == manifest
    assert {name: (path / name).read_bytes() for name in manifest["files"]} == {
        name: written[path / name] for name in manifest["files"]
    }


def test_a_file_that_the_manifest_does_not_name_is_nobodys_business(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    (save(store, 5) / "notes.txt").write_text("kept for the paper")
    assert store.newest().step == 5


def test_only_damaged_checkpoints_end_in_an_error_that_names_them_all_and_the_remedy(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 6):
        flip(save(store, step))
    with pytest.raises(CheckpointDamaged) as caught:
        store.newest()
    assert all(part in str(caught.value) for part in ("step_5", "step_6", "Delete them", "start a new run"))


@pytest.mark.parametrize("step", [6, 7])  # in the place of one that stands, and beside it
def test_a_kill_at_any_moment_leaves_the_checkpoint_before_or_the_new_one_whole(tmp_path, step):
    moments = 0
    while True:
        root = tmp_path / str(moments)
        store = CheckpointStore(root, keep=1)
        save(store, 6, mark=b"before")
        status = act_and_die(lambda store=store: save(store, step, mark=b"new"), after=moments)
        assert status in (0, KILLED)
        found = store.newest()
        mark = (found.path / "mark").read_bytes()
        assert (found.step, mark) in [(6, b"before"), (step, b"new")] and found.damaged == ()
        if status == 0:
            assert mark == b"new"
            break
        save(store, 8)  # whatever was left does not stand in the way, and goes
        assert names(root) == ["step_8"]
        shutil.rmtree(root)
        moments += 1
    assert moments > 30  # it was killed at so many different moments


def test_a_full_disk_leaves_the_older_checkpoints_and_no_unfinished_folder(tmp_path):
    """For real: a child whose files may hold 16 bytes; the manifest is longer."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        save(store, step)

    def fail() -> None:
        store.begin(3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointFailed, match=r"step_3.partial could not be written.*stand, by step: 1, 2"):
            store.commit(3)

    assert in_a_child(fail) == 0
    assert names(tmp_path) == ["step_1", "step_2"]
    assert store.newest().step == 2


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_file_system_that_refuses_any_call_leaves_the_older_checkpoint(tmp_path, monkeypatch, call):
    real, refused = getattr(os, call), 0
    while True:
        root = tmp_path / str(refused)
        store = CheckpointStore(root, keep=1)
        save(store, 6, mark=b"before")
        left = refused

        def refuse(*arguments):
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        folder = store.begin(6)
        fill(folder, 6)
        with monkeypatch.context() as patch:
            patch.setattr(store_module.os, call, refuse)
            try:
                store.commit(6)
            except CheckpointFailed as error:
                assert "No space left on device" in str(error)
            else:
                break
        assert not folder.exists()
        assert store.newest().step == 6
        refused += 1
    assert refused >= 2


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointFailed, match="could not be written"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=1).begin(0)
