"""How a real run ends when it cannot go on: the exit status, and what the person is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engines

CONFIG = """
run: {{name: failing, root: {root}, steps: 4}}
model: {{path: {model}}}
data: {{task: {{name: reversed_sum}}, eval_questions: 50}}
reward: {{path: "{reward}", timeout_s: 0.5, max_drops_in_a_row: 20}}
rollout: {{max_staleness: 1, group_size: 4, max_tokens: 6, cpus_per_replica: 1}}
train: {{prompts_per_batch: 4, lr: {lr}}}
ray: {{dashboard: false}}
"""


def run(folder: Path, **values: object) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(root=folder, **values))
    command = [sys.executable, "-m", "rlsys", "train", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return ended, json.loads((folder / "failing" / "result.json").read_text())


def test_weights_that_blow_up_end_the_run_with_status_one_and_the_last_good_version(tmp_path, model):
    reward = tmp_path / "parity.py"  # answers of a random model must differ in reward, or nothing moves
    reward.write_text("def reward(prompt, completion, answer):\n    return sum(map(ord, completion)) % 2\n")
    ended, result = run(tmp_path, model=model, lr="1.0e+30", reward=f"{reward}:reward")
    assert ended.returncode == 1 and result["exit"] == 1
    assert "Diverged" in ended.stdout and "not finite at step 1" in ended.stdout and "0.0" in ended.stdout


def test_a_reward_that_always_fails_stops_the_run_with_its_first_traceback_and_is_never_a_zero(tmp_path, model):
    reward = tmp_path / "broken.py"
    reward.write_text(
        "import time\n\n\ndef reward(prompt, completion, answer):\n"
        "    if len(completion) % 2:\n        time.sleep(60)\n    return {}['no such key']\n"
    )
    ended, result = run(tmp_path, model=model, lr="1.0e-4", reward=f"{reward}:reward")
    assert ended.returncode == 1 and result["exit"] == 1
    assert "TooManyDrops" in ended.stdout and "20 rollouts in a row got no reward" in ended.stdout
    assert "eval_before" not in result and result["rollouts"] == 0
