"""The shape of a causal language model, read from its folder without its weights, and what training costs in it.

Legend: L tokens of a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig

from rlsys.batch.cost import TokenCost


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What memory and time depend on. Architectures differ in details; of a mixture of experts, ``mlp_width`` is that
    of all experts that a token goes through."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int

    @property
    def linear_parameters(self) -> int:
        """Weights that a token is multiplied with, those of the head included."""
        attention = self.width * self.head_width * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp_width) + self.width * self.vocab_size

    @property
    def token_cost(self) -> TokenCost:
        """Floating-point operations of a forward pass: two a weight and token; of causal attention two matrix products
        over half the pairs of tokens. The backward pass takes twice as many of both."""
        return TokenCost(
            linear=2.0 * self.linear_parameters, attention=2.0 * self.layers * self.heads * self.head_width
        )


@functools.cache
def shape_of(model_path: str) -> ModelShape:
    """Of the model in a Hugging Face folder."""
    return shape_from(AutoConfig.from_pretrained(model_path).get_text_config())


def shape_from(config: PreTrainedConfig) -> ModelShape:
    """Of a text model's configuration."""
    width, heads = config.hidden_size, config.num_attention_heads
    dense_width = getattr(config, "intermediate_size", None) or 4 * width
    if isinstance(dense_width, list):  # one for each layer
        dense_width = max(dense_width)
    experts = getattr(config, "num_experts_per_tok", None)
    expert_width = getattr(config, "moe_intermediate_size", None) or dense_width
    return ModelShape(
        layers=config.num_hidden_layers,
        width=width,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        mlp_width=experts * expert_width if experts else dense_width,
        vocab_size=config.vocab_size,
    )
