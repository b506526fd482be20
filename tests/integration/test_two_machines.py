"""A run on two Ray nodes, each with a network of its own: the engine is not where the learner is, and its weights come
over TCP. Network namespaces stand in for machines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=check)


def inside(node: str, *words: str, **keys) -> subprocess.CompletedProcess[str]:
    return run("ip", "netns", "exec", node, *words, **keys)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of two nodes with one CPU each; yields its address."""
    ray = str(Path(sys.executable).with_name("ray"))
    remove_nodes()
    first, second = NODES
    run("ip", "link", "add", "rlsys-va", "type", "veth", "peer", "name", "rlsys-vb")
    try:
        for node, link in ((first, "rlsys-va"), (second, "rlsys-vb")):
            run("ip", "netns", "add", node)
            run("ip", "link", "set", link, "netns", node)
            inside(node, "ip", "addr", "add", f"{NODES[node]}/24", "dev", link)
            inside(node, "ip", "link", "set", link, "up")
            inside(node, "ip", "link", "set", "lo", "up")
        address = f"{NODES[HEAD]}:{PORT}"
        limits = ("--num-cpus=1", "--object-store-memory=100000000")
        inside(first, ray, "start", "--head", f"--node-ip-address={NODES[first]}", f"--port={PORT}", *limits,
               "--include-dashboard=false", timeout_s=120)  # fmt: skip
        inside(second, ray, "start", f"--address={address}", f"--node-ip-address={NODES[second]}", *limits,
               timeout_s=120)  # fmt: skip
        yield address
    finally:
        for node in NODES:
            inside(node, ray, "stop", "--force", timeout_s=60, check=False)
        remove_nodes()


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
