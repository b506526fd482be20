"""FLOPs of a model, and what the processors could do."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.records import Version
from rlsys.train.lora import with_adapters
from rlsys.train.speed import Work, matrix_peak, work_of
from tests.laws.learner_ranks import make_groups

SMALL = {
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ATTENTION = 8 * 8 + 2 * 8 * 4 + 8 * 8
HEAD = 100 * 8


def work(kind: str, lora: dict[str, int] | None = None, **keys: object) -> Work:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **keys}))
    return work_of(model if lora is None else with_adapters(model, lora))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_weight_costs_a_token_six_flops_and_a_look_up_none(is_tied):
    found = work("qwen2", tie_word_embeddings=is_tied)
    assert found == Work(of_token=6 * (2 * (ATTENTION + 3 * 8 * 16) + HEAD), of_pair=12 * 2 * 2 * 4)


def test_of_experts_those_count_that_a_token_goes_to():
    router = 4 * 8
    found = work("mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert found.of_token == 6 * (2 * (ATTENTION + router + 2 * 3 * 8 * 16) + HEAD)


def test_a_frozen_weight_costs_four_flops():
    adapters = 2 * 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))
    found = work("llama", lora={"r": 2})
    assert found.of_token == 4 * (2 * (ATTENTION + 3 * 8 * 16) + HEAD) + 6 * adapters


def test_sequences_are_counted_without_padding_and_each_with_its_own_attention():
    groups = make_groups(Version(incarnation=0, step=7))
    samples = build(groups, advantage=grpo, oldest_step=0, correct_at=1.0)
    batch = pack(
        samples,
        ranks=2,
        steps_per_batch=1,
        tokens_per_microbatch=64,
        pad_token_id=3,
        version=Version(incarnation=0, step=7),
    )
    lengths = [len(sample.token_ids_T) for sample in samples]
    own = [Work(of_token=2.0, of_pair=3.0).of(batch.for_rank(rank).parts[0]) for rank in range(2)]
    assert own[0].plus(own[1]).value() == 2 * sum(lengths) + 3 * sum(length * length for length in lengths)


def test_the_peak_is_more_than_a_product_of_small_matrices_reaches():
    assert matrix_peak(torch.float32, "cpu") > 1e8
