"""A run on two Ray nodes, each with a network of its own: the second one joins while the run goes on, gets an engine
whose weights come over TCP, and leaves again. Network namespaces stand in for machines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
    ),
]

NODES = {"rlsys-a": "10.77.0.1", "rlsys-b": "10.77.0.2"}
HEAD, SECOND, PORT = "rlsys-a", "rlsys-b", 6399
HEAD_UP_S, STEP_S, JOIN_S, END_S = 90.0, 150.0, 150.0, 90.0  # deadlines
PILE_UP_S = 10.0
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}  # nobody else is on this network

# Fewer slots than a batch has rollouts: the engine that has a new version first must leave some to the other one.
CONFIG = """
run: {{name: two, root: {root}, steps: 8}}
model: {{path: {model}}}
data: {{task: {{name: reversed_sum}}, eval_questions: 20}}
reward: {{path: "{reward}", timeout_s: 250}}
rollout: {{replicas: auto, max_staleness: 1, group_size: 3, max_tokens: 6, slots: 8, cpus_per_replica: 1}}
train: {{prompts_per_batch: 8, tokens_per_microbatch: 256, lr: 1.0e-3, cpus_per_rank: 1}}
eval: {{every_steps: 0}}
observe: {{rollouts_per_step: 8}}
ray: {{address: "{address}"}}
"""
# The run waits, after 20 held-out answers and two batches, and again after five, until the test has seen what it waits
# for.
REWARD = """
import time
from pathlib import Path

num_scored = 0
GATES = {{70: Path("{root}/joined"), 140: Path("{root}/left")}}


def reward(prompt, completion, answer):
    global num_scored
    num_scored += 1
    while any(num_scored > number and not gate.exists() for number, gate in GATES.items()):
        time.sleep(0.1)
    return float(sum(map(ord, completion)) % 2)
"""


def run(*words: str, timeout_s: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s, check=check)


def inside(node: str, *words: str, **keys) -> subprocess.CompletedProcess[str]:
    return run("ip", "netns", "exec", node, *words, **keys)


@pytest.fixture
def address() -> Iterator[str]:
    """A cluster of one node, and a second machine that could join; yields its address."""
    remove_nodes()
    run("ip", "link", "add", "rlsys-va", "type", "veth", "peer", "name", "rlsys-vb")
    head: subprocess.Popen[bytes] | None = None
    try:
        for node, link in zip(NODES, ("rlsys-va", "rlsys-vb"), strict=True):
            run("ip", "netns", "add", node)
            run("ip", "link", "set", link, "netns", node)
            inside(node, "ip", "addr", "add", f"{NODES[node]}/24", "dev", link)
            inside(node, "ip", "link", "set", link, "up")
            inside(node, "ip", "link", "set", "lo", "up")
        address = f"{NODES[HEAD]}:{PORT}"
        head = start(HEAD, "--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=2")
        wait_until_up(address)
        yield address
    finally:
        end(head)
        remove_nodes()


def end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.terminate()  # `ray start --block` takes its own processes along, and no others
        process.wait(30)


def start(node: str, *words: str) -> subprocess.Popen[bytes]:
    ray = str(Path(sys.executable).with_name("ray"))
    limits = ("--object-store-memory=100000000", f"--node-ip-address={NODES[node]}")
    command = ["ip", "netns", "exec", node, ray, "start", "--block", *limits, *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until_up(address: str) -> None:
    """Until the head node takes connections."""
    host, _, port = address.partition(":")
    ask = f"import socket; socket.create_connection(({host!r}, {port}), 1)"
    until = time.monotonic() + HEAD_UP_S
    while inside(HEAD, sys.executable, "-c", ask, check=False).returncode:
        assert time.monotonic() < until, "the head node did not come up"
        time.sleep(0.5)


def remove_nodes() -> None:
    for node in NODES:
        run("ip", "netns", "del", node, check=False)
    run("ip", "link", "del", "rlsys-va", check=False)


def wait_for(what: str, said: Path, training: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Until the run has said it."""
    until = time.monotonic() + timeout_s
    while what not in said.read_text():
        assert training.poll() is None and time.monotonic() < until, f"{what}: not said\n{said.read_text()}"
        time.sleep(0.2)


def engine_of(node: str) -> int:
    """Process id of the only engine there."""
    pids = run("ip", "netns", "pids", node).stdout.split()
    titles = {int(pid): cmdline.read_text() for pid in pids if (cmdline := Path("/proc", pid, "cmdline")).exists()}
    (engine,) = (pid for pid, title in titles.items() if title.startswith("ray::Rollout"))
    return engine


def kill_with_rollouts(engine: int, said: Path) -> None:
    """The process dies, as it would for want of memory. It is stopped first: either rollouts of the first batches are
    under way then, or those that follow after the first step are sent to it meanwhile."""
    os.kill(engine, signal.SIGSTOP)
    until = time.monotonic() + PILE_UP_S
    while "step 1/8" not in said.read_text() and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(0.5)
    os.kill(engine, signal.SIGKILL)


def test_engines_come_and_go_while_a_run_goes_on_and_nothing_is_lost(tmp_path, model, address):
    """The only engine dies and is replaced, a machine joins and gets one, which plays, and the machine leaves."""
    config, reward, said = tmp_path / "config.yaml", tmp_path / "odd.py", tmp_path / "said.txt"
    reward.write_text(REWARD.format(root=tmp_path))
    config.write_text(CONFIG.format(root=tmp_path, model=model, reward=f"{reward}:reward", address=address))
    second: subprocess.Popen[bytes] | None = None
    command = ["ip", "netns", "exec", HEAD, sys.executable, "-m", "rlsys", "train", str(config)]
    with said.open("wb") as out, subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out) as training:
        try:
            wait_for("eval_before", said, training, STEP_S)
            kill_with_rollouts(engine_of(HEAD), said)
            wait_for("rollout-0 is out of service: rollout-0 died", said, training, STEP_S)
            second = start(SECOND, f"--address={address}", "--num-cpus=1")
            wait_for("rollout-1 has proven version", said, training, JOIN_S)
            wait_for("rollout-2: on another machine than the learner; weights go there", said, training, JOIN_S)
            wait_for("rollout-2 has proven version", said, training, STEP_S)
            (tmp_path / "joined").touch()
            wait_for("step 4/8", said, training, STEP_S)
            end(second)
            wait_for("rollout-2 is out of service", said, training, STEP_S)
            (tmp_path / "left").touch()
            training.wait(END_S)
        finally:
            training.kill()
            end(second)
    assert training.returncode == 0, said.read_text()
    figures = json.loads((tmp_path / "two" / "result.json").read_text())
    assert figures["steps"] == 8 and figures["weights/published"] >= 2 and figures["weights/refused"] == 0
    assert figures["rollout/engines_joined"] == figures["rollout/engines_lost"] == 2
    assert figures["rollouts"] == 8 * 24 and figures["rollouts_retried"] > 0
    causes = {name for name, number in figures.items() if name.startswith("dropped/") and number}
    assert causes <= {"dropped/too_stale", "dropped/stopped"}  # both of age: an engine was dead for a while
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("weights/probe_difference", 0.0) for line in lines) < 1e-4
    assert max(line["staleness/max"] for line in lines) <= 1
    played = pyarrow.parquet.read_table(tmp_path / "two" / "rollouts", columns=["engine"]).column("engine")
    assert {"rollout-1", "rollout-2"} <= set(played.to_pylist())
