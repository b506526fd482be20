"""A run that asks for more than its cluster holds is refused with what is there and what is asked: a real cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.config.checks import check_sections
from rlsys.config.load import load_config
from rlsys.config.presets import resolve

pytestmark = pytest.mark.engines

CONFIG = """
run: {{name: crowded, root: {root}, steps: 1}}
model: {{path: {model}}}
data: {{task: {{name: reversed_sum}}, eval_questions: 50}}
rollout: {{replicas: 300, cpus_per_replica: 2}}
train: {{ranks: 3, cpus_per_rank: 0.5}}
ray: {{dashboard: false}}
"""


def test_more_workers_than_the_cluster_holds_are_refused_before_one_starts(tmp_path: Path, model: Path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path, model=model))
    command = [sys.executable, "-m", "rlsys", "train", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    refusal = re.search(
        r"config error: (.+)\n  got:    (.+)\n  wanted: (.+)\n  remedy: (.+)\n", ended.stderr, flags=re.DOTALL
    )
    assert refusal is not None, ended.stderr
    what, got, wanted, remedy = refusal.groups()
    assert what == "machines for 300 rollout replicas, 3 learner processes"
    assert re.fullmatch(r"1 in the cluster, with \d+ CPUs, \d+ GPUs", got)
    assert wanted == "601.5 CPUs and 0 GPUs, each part whole on one machine"
    assert "lower rollout.replicas, train.ranks or train.tensor_parallel" in remedy and "larger cluster" in remedy
    # no actor was started and no batch trained: the same folder serves again
    log = (tmp_path / "crowded" / "log.txt").read_text()
    assert "starting the rollout engines" not in log
    assert not (tmp_path / "crowded" / "result.json").exists()
    check_sections(resolve(load_config(config, ["rollout.replicas=1"])))
