"""Algorithms that need more than rollouts and their rewards, on the real engines at tiny size: a critic, a reference, a
teacher, greedy rollouts, groups that are replaced."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlsys

pytestmark = pytest.mark.engines

CONFIG = """
run: {{name: run, root: {root}, steps: 3}}
model: {{path: {model}}}
data: {{task: {{name: reversed_sum}}, eval_questions: 20}}
reward: {{path: "{reward}"}}
rollout: {{max_staleness: 1, group_size: 4, max_tokens: 6, slots: 64, cpus_per_replica: 0.4}}
train: {{prompts_per_batch: 8, tokens_per_microbatch: 256, lr: 1.0e-3, cpus_per_rank: 0.4}}
eval: {{every_steps: 0}}
teacher: {{cpus: 0.2}}
ray: {{dashboard: false}}
"""
# A random model is right by chance: its answers must differ in reward all the same. Some questions are too easy.
REWARD = """
from rlsys import RewardResult

def reward(prompt, completion, answer):
    odd = sum(map(ord, completion)) % 2
    easy = prompt.startswith(("1", "2", "3", "4", "5"))
    return RewardResult(1.0 if easy else float(odd), {"odd": odd, "short": 1.0 / (1 + len(completion))})
"""


def train(folder: Path, model: Path, *words: str, resume: bool = False) -> list[dict[str, float]]:
    """A run's metrics, step by step. Its lost rollouts are none."""
    path, reward = folder / "config.yaml", folder / "odd.py"
    reward.write_text(REWARD)
    path.write_text(CONFIG.format(root=folder, model=model, reward=f"{reward}:reward"))
    result = rlsys.run(path, list(words), resume=resume)
    assert result.exit == 0, result.failure
    figures = json.loads((result.folder / "result.json").read_text())
    intended = {"dropped/filtered", "dropped/baseline"}
    lost = {name: v for name, v in figures.items() if name.startswith("dropped/") and name not in intended and v}
    assert not lost or lost.keys() == {"dropped/too_stale"}
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_ppo_learns_a_critic_from_single_rollouts_and_goes_on_with_it(tmp_path, model):
    words = (
        "algo.preset=ppo",
        "rollout.group_size=1",
        "algo.kl={name: k1}",
        "algo.kl_in=reward",
        "algo.kl_coef=0.1",
        "algo.kl_control={name: adaptive_kl, target: 0.001, horizon: 8}",
        "algo.reference_every_steps=3",
        "critic.lr=1e-3",
        "critic.warmup_steps=1",
    )
    steps = train(tmp_path, model, *words)
    assert "actor/grad_norm" not in steps[0] and steps[1]["actor/grad_norm"] > 0.0  # the critic was alone first
    assert all(step["critic/grad_norm"] > 0.0 and math.isfinite(step["critic/vf_loss"]) for step in steps)
    assert abs(steps[0]["critic/kl"]) < 1e-5 and abs(steps[2]["critic/kl"]) > abs(steps[0]["critic/kl"])
    assert steps[2]["critic/score/mean"] == steps[2]["critic/rewards/mean"]
    coefs = [step["actor/kl_coef"] for step in steps]
    later = train(tmp_path, model, *words, "run.steps=4", resume=True)
    assert [step["step"] for step in later] == [1, 2, 3, 4]
    assert [step["actor/kl_coef"] for step in later[:3]] == coefs
    assert later[3]["actor/kl_coef"] != coefs[0] and later[3]["critic/vf_loss"] > 0.0
    assert abs(later[3]["critic/kl"]) < 1e-5  # the reference became the policy, and was saved so


def test_dapo_replaces_groups_parts_of_rewards_are_compared_and_a_teacher_speaks_beside_them(tmp_path, model):
    steps = train(
        tmp_path,
        model,
        "algo.preset=dapo",
        "algo.advantage={name: gdpo}",
        "train.steps_per_batch=1",
        "algo.kl={name: k3}",
        "algo.entropy_coef=0.01",
        "teacher.path=tiny",
        "teacher.top_k=4",
        "teacher.with_reward=true",
    )
    assert all(step["critic/score_parts/odd/mean"] > 0.0 for step in steps)
    assert any(step["critic/filtered_groups"] > 0.0 for step in steps)
    assert all(step["critic/groups_without_variance"] == 0.0 for step in steps)
    assert all(step["teacher/reverse_kl"] > 0.0 for step in steps)
    assert abs(steps[0]["actor/kl_loss"]) < 1e-4 < steps[2]["actor/kl_loss"]
    assert steps[0]["critic/rewards/mean"] <= steps[0]["critic/score/mean"]  # what is too long is punished


def test_greedy_rollouts_are_a_baseline_in_batches_of_tokens_and_adapters_learn_from_a_teacher_alone(tmp_path, model):
    steps = train(
        tmp_path,
        model,
        "algo.preset=remax",
        "run.steps=2",
        "train.batch_by=trained_tokens",
        "train.tokens_per_batch=96",
        "rollout.age_policy=pace",
        "teacher.path=tiny",
        "teacher.coef=0.5",
        "train.lora={r: 4}",
    )
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(torch.any(matrix != 0.0) for name, matrix in adapter.items() if "lora_B" in name)
    sampled = [
        step["perf/total_num_tokens"] / (1 + step["prompt_length/mean"] / step["response_length/mean"])
        for step in steps
    ]
    assert all(96 - 4 * 6 < tokens < 96.5 for tokens in sampled)
    assert all(step["staleness/violations"] >= 0.0 for step in steps)
    assert steps[-1]["dropped/baseline"] >= 2 * 3
    assert all(step["teacher/reverse_kl"] != 0.0 for step in steps)
