"""One run of the quickstart configuration with some keys changed, what is read from its folder, and tables of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

CONFIG = "configs/quickstart.yaml"
COMMON: Mapping[str, str] = {
    "eval.samples": "0",
    "checkpoint.every_steps": "0",
    "observe.tensorboard": "false",
    "ray.dashboard": "false",
}
RUN_TIMEOUT_S = 1800.0  # a run of 80 steps takes about two minutes on two cores
STOP_TIMEOUT_S = 120.0
NUM_LATE = 3
INTENDED = {"dropped/filtered", "dropped/baseline"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one run shows. None where the run did not come so far.

    Attributes:
        failure: empty for a run that ended well.
        accuracies: held-out, of the first weights, during the run, and of the last weights.
        staleness_mean: over all trained rollouts, steps.
        clip_fraction: mean over the steps; None for a loss without a clip.
        dropped: share of the submitted rollouts that were lost: dropped for another cause than a selection's.
        wall_s: seconds of training, without start and end.
    """

    failure: str
    accuracies: tuple[float, ...]
    staleness_mean: float | None
    clip_fraction: float | None
    dropped: float | None
    wall_s: float | None

    @property
    def last(self) -> float | None:
        """Of the last weights."""
        return None if self.failure else self.accuracies[-1]

    @property
    def best(self) -> float | None:
        """The highest that was seen."""
        return max(self.accuracies, default=None)

    @property
    def late(self) -> float | None:
        """Mean of the last three: one evaluation alone moves by some hundredths from step to step."""
        return None if self.failure else fmean(self.accuracies[-NUM_LATE:])


def outcome(label: str, keys: Mapping[str, str], root: Path) -> Outcome:
    """Run the quickstart with ``keys``, or read the run with the same keys that is finished already.

    Args:
        label: begins the run's name, for whoever looks into ``root``.
        keys: dotted keys and their values, as on the command line.
        root: folder of the runs.

    Raises:
        subprocess.CalledProcessError: the run ended without a result: its keys cannot work.
        subprocess.TimeoutExpired: it did not end.
    """
    keys = {**COMMON, **keys}
    digest = hashlib.sha256(json.dumps(dict(sorted(keys.items()))).encode()).hexdigest()[:8]
    folder = root.absolute() / f"{label}-{digest}"
    if not (folder / "result.json").exists():
        if folder.exists():
            shutil.rmtree(folder)  # cut short: its metrics would be continued
        words = [f"{key}={value}" for key, value in keys.items()]
        _train([CONFIG, f"run.name={folder.name}", f"run.root={folder.parent}", *words], folder)
    found = read(folder)
    print(f"{folder.name}: {found.failure or found.accuracies}", file=sys.stderr, flush=True)
    return found


def read(folder: Path) -> Outcome:
    """What stands in the folder of a run that has ended."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    seen = [value for step in steps for key, value in step.items() if key.startswith("val-core/") and "acc/mean" in key]
    accuracies = [result.get("eval_before"), *seen, result.get("eval_after")]
    clipped = [step["actor/pg_clipfrac"] for step in steps if step.get("actor/pg_clipfrac") is not None]
    submitted = result.get("rollouts_submitted")
    lost = sum(value for key, value in result.items() if key.startswith("dropped/") and key not in INTENDED)
    return Outcome(
        failure="" if result["exit"] == 0 else result["failure"] or f"exit {result['exit']}",
        accuracies=tuple(value for value in accuracies if value is not None),
        staleness_mean=result.get("staleness/mean"),
        clip_fraction=fmean(clipped) if clipped else None,
        dropped=lost / submitted if submitted else None,
        wall_s=result.get("wall_s"),
    )


def is_stale(run: Outcome, least: float) -> bool:
    """Whether the run's data were as old as wanted. Where the engine is the slower side, it waits for no one, and what
    it samples is trained while it is fresh: then the run is to be repeated on a quieter machine."""
    return run.staleness_mean is not None and run.staleness_mean >= least


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The words every experiment takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="so many runs of each setting, seeds 0, 1, ...")
    parser.add_argument("--root", type=Path, default=Path("runs/experiments"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="file that has a place for the table: see put_table")
    return parser


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown, its first column to the left and the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)) + "\n"


def each(outcomes: Sequence[Outcome], what: Callable[[Outcome], float | None], digits: int = 3) -> str:
    """A cell: one number a seed."""
    values = [what(found) for found in outcomes]
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def mean(outcomes: Sequence[Outcome], what: Callable[[Outcome], float | None], digits: int = 3) -> str:
    """A cell: the mean over the seeds that have a number."""
    values = [value for value in map(what, outcomes) if value is not None]
    return f"{fmean(values):.{digits}f}" if values else "-"


def put_table(path: Path, name: str, table: str) -> None:
    """Put ``table`` into a markdown file, between ``<!-- table NAME -->`` and ``<!-- end NAME -->``.

    Raises ValueError where the file has no such place.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{path} has no place for a table: {begin.strip()} ... {end}")
    path.write_text(f"{before}{begin}{table}{end}{after}", encoding="utf-8")


def _train(words: Sequence[str], folder: Path) -> None:
    """``rlsys train`` to its end. What becomes of it stands in its result.json."""
    command = [sys.executable, "-m", "rlsys", "train", *words]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        status = process.wait(RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)
        raise
    if not (folder / "result.json").exists():
        raise subprocess.CalledProcessError(status, command)
