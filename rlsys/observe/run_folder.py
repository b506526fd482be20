"""The folder of a run, and where the noise of libraries goes while it runs."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from rlsys.observe.plain_json import as_plain_json


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
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def rollouts_path(self) -> Path:
        return self.path / "rollouts"

    @property
    def tensorboard_path(self) -> Path:
        return self.path / "tensorboard"

    @property
    def model_path(self) -> Path:
        """Where the trained model is exported."""
        return self.path / "model"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration. ``config`` holds plain values (pydantic's ``model_dump(mode="json")``)."""
        write_atomically(self.config_path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the flat result of the run: all of it or nothing. Numbers that are not finite become null."""
        write_atomically(self.result_path, json.dumps(as_plain_json(result), indent=2, allow_nan=False) + "\n")

    def open_log(self) -> TextIO:
        """``log.txt`` to append to, written out line by line."""
        return self.log_path.open("a", buffering=1, encoding="utf-8", errors="replace")


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a crash, finds the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def redirect_library_output(log_path: Path) -> Iterator[TextIO]:
    """Send everything that is written to file descriptors 1 and 2 into ``log_path`` (appended), by whatever library in
    this process or by processes it starts meanwhile. Yields the terminal (the old standard output) for our own words.
    Characters that its encoding lacks are replaced. Undone at the end, also after an error."""
    _flush_all()
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    terminal = os.fdopen(os.dup(saved[1]), "w", buffering=1, encoding=encoding, errors="replace")
    try:
        for fd in saved:
            os.dup2(log_fd, fd)
        yield terminal
    finally:
        _flush_all()
        for fd, original in saved.items():
            os.dup2(original, fd)
            os.close(original)
        os.close(log_fd)
        _close_quietly(terminal)


def _flush_all() -> None:
    """Bring out what Python and C still hold back, while the descriptors lead where it belongs."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    ctypes.CDLL(None).fflush(None)


def _close_quietly(terminal: TextIO) -> None:
    try:
        terminal.close()
    except OSError:  # the terminal is gone, and with it whoever could have read the rest
        return
