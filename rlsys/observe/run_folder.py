"""The folder of a run, and where the noise of libraries goes while it runs."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from rlsys.errors import ConfigError, RlsysError
from rlsys.observe.append_file import AppendFile
from rlsys.observe.plain_json import as_plain_json

LOCK = ".lock"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # full, over its quota, over the limit on the size of a file


class RunFolder:
    """``<root>/<name>/`` and what stands where in it. Creating one creates the folder; files of an earlier run of the
    same name stay until they are written anew (``metrics.jsonl`` and ``log.txt`` are continued)."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = (root / name).absolute()
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def commits_path(self) -> Path:
        """Which draws were trained at which step (observe/lineage)."""
        return self.path / "commits.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def rollouts_path(self) -> Path:
        return self.path / "rollouts"

    @property
    def tensorboard_path(self) -> Path:
        return self.path / "tensorboard"

    @property
    def adapter_path(self) -> Path:
        """Where trained adapters are exported by themselves."""
        return self.path / "adapter"

    @property
    def model_path(self) -> Path:
        """Where the trained model is exported."""
        return self.path / "model"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time runs in a folder. Raises ConfigError while another one does; one that dies lets go."""
        with (self.path / LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"run.name={self.path.name}",
                    got=f"{self.path} is in use by a run that is going on",
                    wanted="a folder that no other process runs in",
                    remedy="wait for its end, stop it, or choose another run.name",
                ) from None
            yield

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration. ``config`` holds plain values (pydantic's ``model_dump(mode="json")``)."""
        write_atomically(self.config_path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the flat result of the run: all of it or nothing. Numbers that are not finite become null.

        Raises RlsysError, with the whole result in its message, where the disk does not take it.
        """
        text = json.dumps(as_plain_json(result), indent=2, allow_nan=False) + "\n"
        try:
            write_atomically(self.result_path, text)
        except OSError as error:
            raise RlsysError(
                f"{self.result_path} cannot be written ({error.strerror}). It would hold:\n{text}"
            ) from error

    def read_result(self) -> dict[str, Any]:
        """What ``result.json`` holds; empty where there is none."""
        if not self.result_path.exists():
            return {}
        result = json.loads(self.result_path.read_text(encoding="utf-8"))
        return result if isinstance(result, dict) else {}

    def open_log(self) -> AppendFile:
        """``log.txt`` to append to."""
        return AppendFile(self.log_path)


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a crash, finds the old file or the new one, never a part. Raises OSError where the disk is full, and
    takes the part back that it wrote."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def redirect_library_output(log_path: Path) -> Iterator[TextIO]:
    """Send everything that is written to file descriptors 1 and 2 into ``log_path`` (appended), by whatever library in
    this process or by processes it starts meanwhile. Yields the terminal (the old standard output) for our own words.
    Characters that its encoding lacks are replaced. Undone at the end, also after an error.

    What is printed while the disk is full is lost. It is no error: a library would end on it where nobody expects that.
    """
    _flush_all()
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    terminal, out, err = _writing_to(saved[1], encoding), _writing_to(1), _writing_to(2)
    try:
        for fd in saved:
            os.dup2(log_fd, fd)
        with redirect_stdout(out), redirect_stderr(err):
            yield terminal
    finally:
        _flush_all(out, err)
        _close_quietly(terminal)
        for fd, original in saved.items():
            os.dup2(original, fd)
            os.close(original)
        os.close(log_fd)


class _LossyFile(io.FileIO):
    """A descriptor that takes everything: what a full disk behind it does not is gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            return memoryview(data).nbytes


def _writing_to(fd: int, encoding: str = "utf-8") -> TextIO:
    """Line by line. Characters that the encoding lacks are replaced. The descriptor stays open."""
    lines = io.BufferedWriter(_LossyFile(fd, "w", closefd=False))
    return io.TextIOWrapper(lines, encoding=encoding, errors="replace", line_buffering=True)


def _flush_all(*streams: TextIO) -> None:
    """Bring out what Python and C still hold back, while the descriptors lead where it belongs."""
    for stream in (*streams, sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with suppress(OSError):  # a full disk: what is held back is lost
                stream.flush()
    ctypes.CDLL(None).fflush(None)


def _close_quietly(terminal: TextIO) -> None:
    try:
        terminal.close()
    except OSError:  # the terminal is gone, and with it whoever could have read the rest
        return
