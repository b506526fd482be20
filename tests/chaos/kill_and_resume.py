"""Kills real runs at random moments, resumes them, and checks that nothing was lost, repeated or left behind.

    python -m tests.chaos.kill_and_resume --kills 20 --seed 0

Each kill is a SIGKILL of the driver. After it every process of the run must end, and nothing of it may stay in shared
memory. A run is resumed until it ends by itself; then every draw must have been trained once (law 5).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlsys.observe.lineage import check_exactly_once, last_version

TAG = "RLSYS_CHAOS_TAG"  # in the environment of every process that descends from a run
GONE_WITHIN_S = 90.0  # agents of Ray look for their parent once in a while
END_WITHIN_S = 600.0
STEPS, PROMPTS, GROUP = 40, 4, 4
EVERY_STEPS = 5  # a checkpoint
SHM = Path("/dev/shm")
CONFIG = """
run: {{name: {name}, root: {root}, steps: {steps}}}
model: {{path: {model}}}
data: {{task: {{name: reversed_sum}}, eval_questions: 20}}
rollout: {{max_staleness: 1, group_size: {group}, max_tokens: 6, slots: 64}}
train: {{prompts_per_batch: {prompts}, lr: 1.0e-4}}
eval: {{every_steps: 5}}
checkpoint: {{every_steps: {every}}}
ray: {{dashboard: false}}
"""


@dataclass(slots=True)
class Run:
    """One run folder, and the processes of its present life."""

    folder: Path
    config: Path
    tag: str
    output: Path
    others: frozenset[Path]  # what lay in shared memory before

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rlsys", "train", str(self.config), *overrides, "--resume"]
        with self.output.open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, TAG: self.tag})

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _environment(process).get(TAG) == self.tag]

    def shared_memory(self) -> list[Path]:
        """What the run left there: weight segments, and semaphores that nobody holds any more."""
        semaphores = [path for path in SHM.glob("sem.*") if path not in self.others]
        held = _held_inodes() if semaphores else set()
        return sorted(SHM.glob(f"rlsys@{self.folder.name}@*")) + [
            path for path in semaphores if path.exists() and path.stat().st_ino not in held
        ]

    def result(self) -> dict[str, object]:
        return json.loads((self.folder / "result.json").read_text())


def make_run(root: Path, name: str, model: str) -> Run:
    config = root / f"{name}.yaml"
    config.write_text(
        CONFIG.format(name=name, root=root, model=model, steps=STEPS, prompts=PROMPTS, group=GROUP, every=EVERY_STEPS),
        encoding="utf-8",
    )
    return Run(
        folder=root / name,
        config=config,
        tag=f"{name}-{os.getpid()}",
        output=root / f"{name}.out",
        others=frozenset(SHM.iterdir()),
    )


def kill_once(run: Run, chance: random.Random) -> str | None:
    """Start or resume the run, kill it at a random moment; None where it ended before. Returns what was going on.

    Half of the moments lie in the start, the others in the training: it is the shorter part, and the interesting one.
    """
    seen_before = run.output.read_text(errors="replace").count("eval_before") if run.output.exists() else 0
    driver = run.start()
    in_training = chance.random() < 0.6
    if in_training:
        wait_until(
            lambda: driver.poll() is not None or _trains(run, seen_before), END_WITHIN_S, "the training to begin"
        )
    deadline = time.monotonic() + chance.uniform(0.0, 8.0 if in_training else 25.0)
    while driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if driver.poll() is not None:
        assert driver.returncode == 0, f"the run failed by itself:\n{_tail(run.output)}"
        return None
    _kill(run, driver)
    trained = last_version(run.folder / "commits.jsonl")
    return f"in {'its training' if in_training else 'its start'}, last trained version {trained or 'none'}"


def kill_in_a_save(run: Run, after: int) -> int:
    """Start the run, and kill it while it writes a checkpoint of a step above ``after``. Returns that step."""
    driver = run.start()

    def saved_step() -> int:
        assert driver.poll() is None, f"no checkpoint could be caught:\n{_tail(run.output)}"
        begun = (int(path.name.split(".")[1][5:]) for path in (run.folder / "checkpoints").glob(".step_*.partial"))
        return max((step for step in begun if step > after), default=0)

    while True:
        wait_until(saved_step, END_WITHIN_S, "a checkpoint to be written", every_s=0.001)
        driver.send_signal(signal.SIGSTOP)  # it commits no more; was it too quick, the next one is waited for
        if step := saved_step():
            _kill(run, driver)
            return step
        driver.send_signal(signal.SIGCONT)


def _kill(run: Run, driver: subprocess.Popen[bytes]) -> None:
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_until(
        lambda: not run.processes(), GONE_WITHIN_S, f"the processes of {run.tag} to end", lambda: str(run.processes())
    )
    wait_until(
        lambda: not run.shared_memory(), GONE_WITHIN_S, "shared memory to be freed", lambda: str(run.shared_memory())
    )


def finish(run: Run, *overrides: str) -> None:
    """Resume until the run has ended by itself, and check what it left."""
    driver = run.start(*overrides)
    assert driver.wait(END_WITHIN_S) == 0, _tail(run.output)
    check(run)


def check(run: Run) -> None:
    check_exactly_once(run.folder / "commits.jsonl", STEPS)
    result = run.result()
    assert result["exit"] == 0 and result["steps"] == STEPS, result
    assert result["rollouts"] == STEPS * PROMPTS * GROUP, result
    assert [row["step"] for row in _rows(run.folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    wait_until(lambda: not run.processes(), GONE_WITHIN_S, "the processes of the finished run to end")
    assert not run.shared_memory()


def main(kills: int, seed: int, model: str) -> None:
    chance = random.Random(seed)
    done = 0
    with tempfile.TemporaryDirectory(prefix="rlsys-chaos-") as folder:
        for number in range(kills + 1):
            run = make_run(Path(folder), f"run-{number}", model)
            while done < kills:
                moment = kill_once(run, chance)
                if moment is None:
                    break
                done += 1
                print(f"kill {done:2d}, {run.folder.name}: {moment}", flush=True)
                if chance.random() < 0.4:  # the others are killed again while they are on their way
                    break
            finish(run)
            print(f"{run.folder.name}: ended well, every draw trained once", flush=True)
            if done == kills:
                break
    print(f"{done} kills: no draw lost or repeated, no process and no shared memory left")


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except (psutil.Error, OSError):  # it ended meanwhile, or is another user's
        return {}


def _held_inodes() -> set[int]:
    """Files in shared memory that a process has mapped. (A semaphore is mapped under another name than its file's.)"""
    held = set()
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            held |= {int(line.split()[4]) for line in maps.splitlines() if str(SHM) in line}
    return held


def _trains(run: Run, seen_before: int) -> bool:
    """The engines and the learner are up: the first evaluation is over, or the run was resumed and trains."""
    text = run.output.read_text(errors="replace")
    life = text[text.rfind("starting the rollout engines") :]
    return text.count("eval_before") > seen_before or "step " in life


def wait_until(until, seconds: float, who: str, state=lambda: "", every_s: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {who} {state()}"
        time.sleep(every_s)


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _rows(path: Path) -> Iterator[dict[str, object]]:
    return (json.loads(line) for line in path.read_text().splitlines())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny", help="model folder, or tiny")
    given = parser.parse_args()
    main(given.kills, given.seed, given.model)
