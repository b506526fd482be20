"""A process that was told so ends with its owner, however the owner ended."""

from __future__ import annotations

import subprocess
import sys

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
WATCH = "import sys, time; from rlsys.weights.owner import end_with_owner; end_with_owner(int(sys.argv[1]))"


def test_a_process_ends_soon_after_its_owner_was_killed():
    with subprocess.Popen(SLEEP) as owner:
        code = f"{WATCH}; print('watching', flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", code, str(owner.pid)], stdout=subprocess.PIPE) as watcher:
            assert watcher.stdout.readline() == b"watching\n"
            assert watcher.poll() is None
            owner.kill()
            owner.wait()
            assert watcher.wait(timeout=10) == 1
