"""A model of the size of SmolLM2-135M with random weights: what is measured needs its shape, not what it has learnt."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_random_smollm2() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            dtype=torch.float32,
        )
    )
