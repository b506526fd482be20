"""What must not outlive its owner, whose process may be killed without a goodbye: an engine's worker, and files in
shared memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

POLL_S = 1.0
OWNER = "RLSYS_OWNER"  # environment variable: process that the children of a process must not outlive
# In the background of a shell that ends at once, so no child of the owner: Ray kills those with it.
_REMOVE_AFTER = f'(while kill -0 "$0"; do sleep {POLL_S:g}; done; rm -f -- "$@") &'


def is_process_alive(pid: int) -> bool:
    """Whether the process exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, under another user
        return True
    return True


def end_with_owner(pid: int) -> None:
    """End this process, at once and without clean-up, within ``POLL_S`` seconds of the end of process ``pid``."""

    def watch() -> None:
        while is_process_alive(pid):
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name=f"end with process {pid}", daemon=True).start()


def own_children() -> None:
    """Processes that this one starts from now on, and theirs, end with it where they call ``end_with_named_owner``."""
    os.environ[OWNER] = str(os.getpid())


def end_with_named_owner() -> None:
    """``end_with_owner`` of the nearest process above this one that called ``own_children``, where there is one."""
    if OWNER in os.environ:
        end_with_owner(int(os.environ[OWNER]))


def remove_with_owner(paths: Sequence[Path], pid: int) -> None:
    """Let ``paths``, which need not exist yet, be removed within about ``POLL_S`` seconds of the end of process
    ``pid``, by a small process of its own: it works where the owner and everything that knows of it was killed."""
    subprocess.run(
        ["sh", "-c", _REMOVE_AFTER, str(pid), *map(str, paths)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the owner's group is not meant for it
        check=True,
    )
