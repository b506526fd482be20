"""DeepSpeed's optimizers for offloaded state are written in C++, and compiled at their first use: a minute, or several.

torch, which compiles them, leaves a lock file behind where it is killed meanwhile, for which every later start would
wait for ever; and ranks that meet at a build wait for one another beyond their deadlines. So a build is done here, in
one process of the machine, before ranks meet; what was built is then loaded without torch's lock.

python -m rlsys.train.compiled_ops BUILDER DEVICE
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rlsys.config.schema import TrainSection
from rlsys.errors import ConfigError, WaitTimeout
from rlsys.train.optimizers import chosen, is_offloaded
from rlsys.train.parallel import load_deepspeed

_TORCH_LOCK = "lock"  # torch's name for it, in the folder of the op
_STAMP = "built_for.json"  # ours, beside it: what the op was compiled for
_POLL_S = 0.2
_SHOWN_OUTPUT = 2000  # characters of the compiler's output in an error


def load_op(builder_name: str, *, device: str, deadline_s: float) -> ModuleType:
    """The compiled op, built where it is not yet. DeepSpeed finds it from now on. No collective: a process that comes
    while another one of the machine builds waits for that one.

    Args:
        builder_name: of DeepSpeed, e.g. ``CPUAdamBuilder``.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: it cannot be compiled here; says what the compiler said.
        WaitTimeout: that took longer than ``deadline_s``.
    """
    builder = _builder(builder_name, device)
    folder = _folder(builder)
    ends_at = time.monotonic() + deadline_s
    with _alone(folder, ends_at, deadline_s):
        if not _is_built(builder, folder):
            _build(builder_name, device, folder, ends_at, deadline_s)
            (folder / _STAMP).write_text(json.dumps(_built_for()), encoding="utf-8")
    module = _imported(builder.name, folder)
    type(builder)._loaded_ops[builder.name] = module
    return module


def load_needed_op(train: TrainSection, *, device: str) -> None:
    """``load_op`` of the section's optimizer, where its state is offloaded and it has an op."""
    op = chosen(train).op
    if op is not None and is_offloaded(train):
        load_op(op, device=device, deadline_s=train.start_timeout_s)


def check_can_compile(key: str) -> None:
    """Raises ConfigError, naming ``key``, where this machine has no C++ compiler or no ninja. Compiles nothing."""
    compiler = os.environ.get("CXX", "c++")
    missing = [name for name in (compiler, "ninja") if shutil.which(name, path=_search_path()) is None]
    if missing:
        raise _cannot(key, f"no {' and no '.join(missing)} on this machine, to compile DeepSpeed's optimizer with")


def _cannot(key: str, got: str) -> ConfigError:
    return ConfigError(
        key,
        got=got,
        wanted="a C++ compiler, ninja and Python's headers",
        remedy="install g++ and ninja-build, or set train.offload=none",
    )


def _builder(name: str, device: str) -> Any:
    load_deepspeed(device)
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder(name)


def _folder(builder: Any) -> Path:
    """Where torch builds it: below ``TORCH_EXTENSIONS_DIR``, or torch's own folder in the user's cache."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(builder.name, verbose=False))


@contextmanager
def _alone(folder: Path, ends_at: float, deadline_s: float) -> Iterator[None]:
    """Within, no other process of ours is at this op. The system lets go where a process ends, however it ends."""
    with open(folder.parent / f".{folder.name}.flock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _wait(f"another process that compiles {folder.name}", ends_at, deadline_s)
        yield


def _wait(who: str, ends_at: float, deadline_s: float) -> None:
    if time.monotonic() >= ends_at:
        raise WaitTimeout(who, deadline_s)
    time.sleep(_POLL_S)


def _built_for() -> dict[str, str]:
    """What a build depends on; an op for another processor ends the process, one for another torch does not load."""
    import deepspeed
    import torch

    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(encoding="utf-8").splitlines() if processor.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": sys.version,
        "processor": hashlib.sha256(flags.encode()).hexdigest(),
    }


def _is_built(builder: Any, folder: Path) -> bool:
    """What was built for something else is removed: the build would take it for its own."""
    try:
        built_for = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # nothing there, or half of it, or DeepSpeed's own, which the build looks through
    if built_for == _built_for() and (folder / f"{builder.name}.so").exists():
        return True
    shutil.rmtree(folder)
    folder.mkdir()
    return False


def _build(builder_name: str, device: str, folder: Path, ends_at: float, deadline_s: float) -> None:
    lock = folder / _TORCH_LOCK
    while lock.exists() and _is_held(lock):
        _wait(f"the process that compiles {folder.name}, and holds {lock}", ends_at, deadline_s)
    lock.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "rlsys.train.compiled_ops", builder_name, device],
        env={**os.environ, "PATH": _search_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its compilers end with it
    )
    try:
        output, _ = process.communicate(timeout=max(0.0, ends_at - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        lock.unlink(missing_ok=True)
        raise WaitTimeout(f"the compiler of DeepSpeed's {folder.name} (in {folder})", deadline_s) from None
    if process.returncode != 0:
        raise _cannot("train.offload", f"DeepSpeed's {folder.name} does not compile here: {output[-_SHOWN_OUTPUT:]}")


def _is_held(lock: Path) -> bool:
    """Whether a process that builds has it open. Nothing can be said of processes of others: then yes."""
    try:
        if lock.stat().st_uid != os.getuid():
            return True
    except FileNotFoundError:
        return False
    own = str(lock.resolve())
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(handle) == own:
                return True
        except OSError:
            continue  # it ended, or is of others
    return False


def _search_path() -> str:
    """With the folder of this Python, where ninja is where it was installed beside it."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _imported(name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _builder(sys.argv[1], sys.argv[2]).load()
