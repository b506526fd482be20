"""A process that was told so ends with its owner, however the owner ended; and so do its files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rlsys.weights.owner import remove_with_owner

DEADLINE_S = 20.0
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
WATCH = "import sys, time; from rlsys.weights.owner import end_with_owner; end_with_owner(int(sys.argv[1]))"
OWN = """
import os, sys, time
from pathlib import Path
from rlsys.weights.owner import remove_with_owner
remove_with_owner([Path(sys.argv[1]), Path(sys.argv[2])], os.getpid())
print("owned", flush=True)
time.sleep(60)
"""


def wait_until(happened: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < ends_at
        time.sleep(0.05)


def test_a_process_ends_soon_after_its_owner_was_killed():
    with subprocess.Popen(SLEEP) as owner:
        code = f"{WATCH}; print('watching', flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", code, str(owner.pid)], stdout=subprocess.PIPE) as watcher:
            assert watcher.stdout.readline() == b"watching\n"
            assert watcher.poll() is None
            owner.kill()
            owner.wait()
            assert watcher.wait(timeout=10) == 1


def test_files_go_with_an_owner_that_was_killed_with_all_its_group(tmp_path):
    """As Ray's workers go: their group and their children are killed. One of the files was never made."""
    left, never, kept = tmp_path / "a b", tmp_path / "never", tmp_path / "kept"
    command = [sys.executable, "-c", OWN, str(left), str(never)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as owner:
        assert owner.stdout.readline() == b"owned\n"
        left.touch(), kept.touch()  # after the sweep was ordered
        assert Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text() == ""
        os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()
        wait_until(lambda: not left.exists())
    assert list(tmp_path.iterdir()) == [kept]


def test_files_of_a_living_owner_stay(tmp_path):
    """Seen by a second sweep for a dead owner, ordered later and done."""
    mine, others = tmp_path / "mine", tmp_path / "others"
    mine.touch(), others.touch()
    with subprocess.Popen(SLEEP) as owner:
        remove_with_owner([mine], owner.pid)
        with subprocess.Popen(["true"]) as dead:
            dead.wait()
        remove_with_owner([others], dead.pid)
        wait_until(lambda: not others.exists())
        assert mine.exists()
        owner.kill()
        owner.wait()
        wait_until(lambda: not mine.exists())
