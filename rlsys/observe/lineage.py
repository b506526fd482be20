"""Which draws were trained at which step: ``commits.jsonl``, a line a step, only ever appended to.

A resume from checkpoint N trains the steps after N again. So a line of step s takes back every earlier line of step s
or later: what then stands is the lineage of the weights that survived.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlsys.errors import LawBroken
from rlsys.observe.append_file import AppendFile
from rlsys.observe.run_folder import write_atomically
from rlsys.records import Version


class CommitLog:
    """Appends ``{"step": 3, "version": "0.3", "draws": ["sums:0:17", ...]}``."""

    def __init__(self, path: Path) -> None:
        _cut_torn_line(path)
        self._file = AppendFile(path)

    def write(self, version: Version, draws: Sequence[str]) -> None:
        row = {"step": version.step, "version": str(version), "draws": list(draws)}
        self._file.write(json.dumps(row).encode() + b"\n")

    def sync(self) -> None:
        """Bring all lines to the disk. Raises OSError where it is full."""
        self._file.sync()

    def retry(self) -> list[str]:
        return self._file.retry()

    def close(self) -> list[str]:
        return self._file.close()


def last_version(path: Path) -> Version | None:
    """The version that was trained last, whether its weights survived or not; None where there was none."""
    return max((Version.parse(row["version"]) for row in _rows(path)), default=None)


def check_exactly_once(path: Path, num_steps: int) -> None:
    """The surviving steps are 1 to ``num_steps``, and no draw was trained at two of them. Raises LawBroken (law 5)."""
    lineage: list[dict[str, Any]] = []
    for row in _rows(path):
        while lineage and lineage[-1]["step"] >= row["step"]:
            lineage.pop()
        lineage.append(row)
    if [row["step"] for row in lineage] != list(range(1, num_steps + 1)):
        raise LawBroken(
            f"{path}: the trained steps on record are {[row['step'] for row in lineage]}, not 1..{num_steps}"
        )
    trained_at: dict[str, int] = {}
    for row in lineage:
        for draw in row["draws"]:
            if draw in trained_at:
                raise LawBroken(
                    f"draw {draw} was trained at step {trained_at[draw]} and at step {row['step']} ({path})"
                )
            trained_at[draw] = row["step"]


def rewind_metrics(path: Path, step: int) -> float:
    """Take the lines of steps after ``step`` out of a metrics file, and one that a kill cut short. All or nothing.

    Returns:
        The seconds since the run began, as its last line said; 0 where there was none.
    """
    rows = list(_rows(path))
    if not rows:
        return 0.0
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    return float(rows[-1]["time_s"])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a last line that a kill cut short is none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _cut_torn_line(path: Path) -> None:
    """A line that a kill cut short must not become the beginning of the next one."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)
