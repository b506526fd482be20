"""A run on two Ray nodes, each with a network of its own: the engine is not where the learner is, and its weights come
over TCP. Network namespaces stand in for machines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
    ),
]

NODES = {"rlsys-a": "10.77.0.1", "rlsys-b": "10.77.0.2"}
HEAD, PORT = "rlsys-a", 6399
RUN_TIMEOUT_S = 280
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled"}  # nobody else is on this network

CONFIG = """
run: {{name: two, root: {root}, steps: 4}}
model: {{path: {model}}}
data: {{task: {{name: reversed_sum}}, eval_questions: 20}}
reward: {{path: "{reward}"}}
rollout: {{max_staleness: 1, group_size: 4, max_tokens: 6, slots: 32, cpus_per_replica: 1}}
train: {{prompts_per_batch: 8, tokens_per_microbatch: 256, lr: 1.0e-3, cpus_per_rank: 1}}
eval: {{every_steps: 0}}
ray: {{address: "{address}"}}
"""
REWARD = "def reward(prompt, completion, answer):\n    return float(sum(map(ord, completion)) % 2)\n"


def run(*words: str, timeout_s: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s, check=check)


def inside(node: str, *words: str, **keys) -> subprocess.CompletedProcess[str]:
    return run("ip", "netns", "exec", node, *words, **keys)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes with one CPU each; yields its address."""
    remove_nodes()
    first, second = NODES
    run("ip", "link", "add", "rlsys-va", "type", "veth", "peer", "name", "rlsys-vb")
    started: list[subprocess.Popen[bytes]] = []
    try:
        for node, link in ((first, "rlsys-va"), (second, "rlsys-vb")):
            run("ip", "netns", "add", node)
            run("ip", "link", "set", link, "netns", node)
            inside(node, "ip", "addr", "add", f"{NODES[node]}/24", "dev", link)
            inside(node, "ip", "link", "set", link, "up")
            inside(node, "ip", "link", "set", "lo", "up")
        address = f"{NODES[HEAD]}:{PORT}"
        started.append(start(first, "--head", f"--port={PORT}", "--include-dashboard=false"))
        wait_until_up(address)
        started.append(start(second, f"--address={address}"))
        yield address
    finally:
        for process in started:
            process.terminate()  # with --block it takes its own processes along, and no others
        for process in started:
            process.wait(30)
        remove_nodes()


def start(node: str, *words: str) -> subprocess.Popen[bytes]:
    ray = str(Path(sys.executable).with_name("ray"))
    limits = ("--num-cpus=1", "--object-store-memory=100000000", f"--node-ip-address={NODES[node]}")
    command = ["ip", "netns", "exec", node, ray, "start", "--block", *limits, *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until_up(address: str, timeout_s: float = 90.0) -> None:
    """Until the head node takes connections."""
    host, _, port = address.partition(":")
    ask = f"import socket; socket.create_connection(({host!r}, {port}), 1)"
    until = time.monotonic() + timeout_s
    while inside(HEAD, sys.executable, "-c", ask, check=False).returncode:
        assert time.monotonic() < until, "the head node did not come up"
        time.sleep(0.5)


def remove_nodes() -> None:
    for node in NODES:
        run("ip", "netns", "del", node, check=False)
    run("ip", "link", "del", "rlsys-va", check=False)


def test_weights_reach_an_engine_on_another_machine_and_are_proven_there(tmp_path, model, address):
    config, reward = tmp_path / "config.yaml", tmp_path / "odd.py"
    reward.write_text(REWARD)
    config.write_text(CONFIG.format(root=tmp_path, model=model, reward=f"{reward}:reward", address=address))
    ended = inside(HEAD, sys.executable, "-m", "rlsys", "train", str(config), timeout_s=RUN_TIMEOUT_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "rollout-0: on another machine than the learner; weights go there over TCP" in ended.stdout
    figures = json.loads((tmp_path / "two" / "result.json").read_text())
    assert figures["steps"] == 4 and figures["weights/published"] >= 2 and figures["weights/refused"] == 0
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("weights/probe_difference", 0.0) for line in lines) < 1e-4
    assert max(line["staleness/max"] for line in lines) <= 1
