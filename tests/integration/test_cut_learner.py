"""A real run whose learner is two processes that share the layers of one model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import rlsys
from tests.integration.test_real_run import check_plain_engines_agree, write_config

pytestmark = pytest.mark.engines


def test_engines_get_the_weights_of_a_learner_whose_layers_are_cut(tmp_path, model):
    path = write_config(
        tmp_path,
        name="cut",
        steps=3,
        model=model,
        replicas=1,
        ranks="1, tensor_parallel: 2, activation_checkpointing: true",
        stage=3,
        eta=0,
        temperature=1.0,
        deepspeed="{zero_optimization: {stage3_param_persistence_threshold: 0}}",
    )
    result = rlsys.train(path)
    assert result.exit == 0, result.failure
    assert result.figures["weights/published"] >= 3 and result.figures["weights/refused"] == 0
    steps = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    # what the engine samples is what the cut model says, version after version
    assert max(step["rollout_corr/on_policy_logprob_abs_diff_mean"] for step in steps) < 1e-4
    assert all(step["actor/grad_norm"] > 0.0 for step in steps)
    trained = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=torch.float32)
    first = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for (name, after), (_, before) in zip(trained.named_parameters(), first.named_parameters(), strict=True):
        assert after.shape == before.shape and not torch.equal(after, before), name
    check_plain_engines_agree(result.folder / "model", model)
