"""Training in bfloat16: how far the learner's log-probabilities are from those in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from tests.laws.learner_ranks import VOCABULARY, make_groups, section
from tests.laws.test_gradient import OLDEST_STEP, VERSION, packed

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def large_logits(tmp_path_factory) -> str:
    """A model whose logits are about 60 and differ by a few, as those of trained models do: what they have in common
    says nothing, and costs bfloat16 its digits."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight.mul_(10.0)[:, 0] = 8.0
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # so that it is the computation that differs, not the weights
    folder = tmp_path_factory.mktemp("large_logits")
    model.save_pretrained(folder)
    return str(folder)


def probed(ranks, model_path: str, zero_stage: int, **keys: object) -> np.ndarray:
    tokens = [rollout.token_ids_T for group in make_groups(VERSION) for rollout in group.rollouts]
    outcome, _ = ranks.run(
        2, lambda rank: [], model_path=model_path, train=section(zero_stage, 2, **keys), probe=tokens
    )
    return np.concatenate(outcome.probe)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_float32_head_brings_a_bfloat16_model_closer_to_the_float32_one(ranks, large_logits, zero_stage):
    whole = probed(ranks, large_logits, zero_stage)
    half, mixed = (
        np.abs(probed(ranks, large_logits, zero_stage, dtype="bfloat16", float32_head=in_float32) - whole).mean()
        for in_float32 in (False, True)
    )
    print(f"mean |difference| from float32: {half:.4f} with a bfloat16 head, {mixed:.4f} with a float32 one")
    assert mixed < 0.9 * half


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_gradient_norm_in_bfloat16_is_that_of_float32_to_its_digits(ranks, model_path, zero_stage):
    samples = build(make_groups(VERSION), advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0)

    def norm(dtype: str) -> float:
        train = section(zero_stage, 2, dtype=dtype, optimizer={"name": "adamw"}, lr=1e-3)
        outcome, _ = ranks.run(2, packed(samples, 2, 64), model_path=model_path, train=train)
        return outcome.metrics[0]["actor/grad_norm"]

    assert norm("bfloat16") == pytest.approx(norm("float32"), rel=0.02)
