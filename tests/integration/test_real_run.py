"""The whole system on the real engines: vLLM, DeepSpeed and Ray, at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

import rlsys
from rlsys.actors import setup
from rlsys.config.load import load_config
from rlsys.records import Version
from tests.laws.synchronous_reference import CAP, EPS

pytestmark = pytest.mark.engines

CONFIG = """
run: {{name: {name}, root: {root}, steps: {steps}}}
model: {{path: {model}}}
data: {{task: {{name: reversed_sum}}, eval_questions: 100}}
reward: {{path: "{reward}", workers: 2}}
rollout: {{replicas: {replicas}, max_staleness: {eta}, group_size: 4, max_tokens: 6, temperature: {temperature},
  slots: 64, cpus_per_replica: 0.4}}
train: {{ranks: {ranks}, zero_stage: {stage}, prompts_per_batch: 8, steps_per_batch: 1,
  tokens_per_microbatch: 256, lr: 1.0e-3,
  cpus_per_rank: 0.4, deepspeed: {deepspeed}}}
eval: {{every_steps: 2, samples: 2, pass_at: [1, 2]}}
ray: {{dashboard: false}}
"""


# a random model is right by chance: its answers must differ in reward all the same
REWARD = "def reward(prompt, completion, answer):\n    return float(sum(map(ord, completion)) % 2)\n"


def write_config(folder: Path, **values) -> Path:
    path, reward = folder / "config.yaml", folder / "parity.py"
    reward.write_text(REWARD)
    path.write_text(CONFIG.format(root=folder, reward=f"{reward}:reward", **values))
    return path


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory, model):
    """Two replicas, two ranks under ZeRO-3 that really partitions, staleness 1."""
    folder = tmp_path_factory.mktemp("asynchronous")
    path = write_config(
        folder,
        name="two-by-two",
        steps=5,
        model=model,
        replicas=2,
        ranks=2,
        stage=3,
        eta=1,
        temperature=1.0,
        deepspeed="{zero_optimization: {stage3_param_persistence_threshold: 0}}",
    )
    return rlsys.train(path)


def test_an_asynchronous_run_ends_well_and_everything_is_accounted_for(asynchronous):
    assert asynchronous.exit == 0, asynchronous.failure
    figures = json.loads((asynchronous.folder / "result.json").read_text())
    assert figures["exit"] == 0 and figures["steps"] == 5
    dropped = sum(value for key, value in figures.items() if key.startswith("dropped/"))
    assert figures["rollouts"] + dropped == figures["rollouts_submitted"] and figures["rollouts"] == 5 * 8 * 4 - dropped
    assert figures["staleness/max"] <= 1
    assert figures["weights/published"] >= 2 and figures["weights/refused"] == 0
    assert 0 <= figures["eval_before"] <= 1 and 0 <= figures["eval_after_pass_at_2"] <= 1


def test_engine_and_learner_agree_on_the_logprobs_of_the_same_weights(asynchronous):
    steps = [json.loads(line) for line in (asynchronous.folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    agreed = [
        step["rollout_corr/on_policy_logprob_abs_diff_mean"]
        for step in steps
        if step.get("rollout_corr/on_policy_logprob_abs_diff_mean") is not None
    ]
    assert agreed and max(agreed) < 1e-4
    assert all(step["weights/probe_difference"] < 1e-4 for step in steps if "weights/probe_difference" in step)
    # the weights did move: data of an older policy is measurably off the one that trains it
    assert max(step["rollout_corr/logprob_abs_diff_max"] for step in steps) > 1e-3


def test_sampled_rollouts_are_kept(asynchronous):
    files = sorted((asynchronous.folder / "rollouts").glob("*.parquet"))
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    assert len(rows) == 5 * 4
    assert {row["reward"] for row in rows} <= {0.0, 1.0}


def test_the_exported_model_loads_in_plain_transformers_and_plain_vllm_with_equal_logprobs(asynchronous, model):
    check_plain_engines_agree(asynchronous.folder / "model", model)


def check_plain_engines_agree(folder: Path, first_model: Path) -> None:
    """A trained model's folder, in plain transformers and in plain vLLM; it is another one than the first."""
    import subprocess
    import sys

    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first = AutoModelForCausalLM.from_pretrained(first_model, dtype=torch.float32)
    assert not torch.equal(trained.get_input_embeddings().weight, first.get_input_embeddings().weight)
    token_ids = list(range(5, 45))
    with torch.no_grad():
        logits = trained(torch.tensor([token_ids])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(token_ids[1:])[:, None]).squeeze(1).numpy()
    script = Path(__file__).parent / "plain_vllm.py"
    answer = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(token_ids)], capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    got = np.array(json.loads(answer.stdout.splitlines()[-1]))
    assert np.abs(got - expected).mean() < 1e-4  # the bound of float32, on average
    assert np.abs(got - expected).max() < 1e-3


def test_staleness_zero_is_on_policy_in_order_and_equals_a_plain_loss(tmp_path, model, monkeypatch):
    """Law 7 on the real engines: prompts, versions and order exactly; losses on the recorded batches within 1e-5."""
    path = write_config(
        tmp_path, name="synchronous", steps=3, model=model, replicas=1, ranks=1, stage=0, eta=0, temperature=0.7,
        deepspeed="{}",
    )  # fmt: skip
    recorded = []
    make_batch = setup.make_batch

    def recording(config, inputs, incarnation, groups, step):
        recorded.append((step, groups))
        return make_batch(config, inputs, incarnation, groups, step)

    monkeypatch.setattr(setup, "make_batch", recording)
    result = rlsys.train(path)
    assert result.exit == 0, result.failure
    assert result.figures["staleness/max"] == 0

    steps = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    # below temperature 1 engine and learner still speak of the same distribution
    assert max(step["rollout_corr/on_policy_logprob_abs_diff_mean"] for step in steps) < 1e-4

    config = load_config(path)
    from rlsys.prompts.source import open_source

    source = open_source(config.data, config.run.seed)
    for step, groups in recorded:
        asked = [source.next().draw for _ in range(8)]
        assert sorted(map(str, asked)) == sorted(str(group.prompt.draw) for group in groups)
        code = Version(incarnation=0, step=step).code
        for group in groups:
            for rollout in group.rollouts:
                assert (rollout.versions_T[rollout.loss_mask_T] == code).all()

    # the first batch was trained from the first weights: its loss by hand
    first = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert plain_loss(first, recorded[0][1], 0.7) == pytest.approx(steps[0]["actor/pg_loss"], abs=1e-5)


def plain_loss(model, groups, temperature: float) -> float:
    total, count = 0.0, 0
    for group in groups:
        rewards = np.array([rollout.reward for rollout in group.rollouts])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPS)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            token_ids = torch.tensor(rollout.token_ids_T.astype(np.int64))
            with torch.no_grad():
                logits = model(token_ids[None]).logits[0, :-1] / temperature
            policy = torch.log_softmax(logits, -1).gather(1, token_ids[1:, None]).squeeze(1)
            trained = torch.tensor(rollout.loss_mask_T[1:])
            weight = (policy - torch.tensor(rollout.behaviour_logprobs_T[1:])).exp().clamp(max=CAP)
            total += float((-advantage * weight)[trained].sum())
            count += int(trained.sum())
    return total / count
