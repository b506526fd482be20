"""What a measurement comes to, and on which machine."""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rlsys.bench import BENCHES
from rlsys.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one bench found.

    Attributes:
        figures: flat, by name; names end in their unit.
        table: for the person at the terminal.
    """

    figures: Mapping[str, float]
    table: str


def run_bench(name: str) -> Report:
    """Run the bench of this name with its own settings. Raises ConfigError where there is none."""
    if name not in BENCHES:
        raise ConfigError("NAME", got=name, wanted=f"one of {', '.join(BENCHES)}", remedy="name one of these")
    report: Report = importlib.import_module(f"rlsys.bench.{name.replace('-', '_')}").measure()
    return report


def write_report(path: Path, name: str, report: Report) -> None:
    """Write ``{"bench": name, "figures": {...}, "machine": {...}}``."""
    content = {"bench": name, "figures": dict(report.figures), "machine": machine()}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, str | int]:
    """What the figures depend on, as far as the operating system tells."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
