"""The shape of a model, from its configuration alone."""

from transformers import AutoConfig, GPT2Config, MixtralConfig

from rlsys.bench.smollm2_shape import make_random_smollm2
from rlsys.models.shape import ModelShape, shape_from


def test_linear_parameters_are_all_but_those_of_norms():
    model = make_random_smollm2()
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    shape = shape_from(model.config)
    assert shape.linear_parameters == sum(p.numel() for p in model.parameters()) - norms == 134_479_872


def test_what_a_configuration_leaves_out_follows_from_the_rest():
    shape = shape_from(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100))
    assert shape == ModelShape(layers=2, width=64, heads=4, kv_heads=4, head_width=16, mlp_width=256, vocab_size=100)


def test_a_token_goes_through_some_of_the_experts():
    config = MixtralConfig(intermediate_size=96, num_experts_per_tok=2, num_local_experts=8)
    assert shape_from(config).mlp_width == 2 * 96
    config = AutoConfig.for_model("qwen3_moe", intermediate_size=96, moe_intermediate_size=32, num_experts_per_tok=4)
    assert shape_from(config).mlp_width == 4 * 32


def test_a_token_costs_two_operations_a_weight_and_attention_half_the_pairs():
    shape = ModelShape(layers=2, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=16, vocab_size=32)
    weights = 2 * (8 * 4 * 2 * (2 + 1) + 3 * 8 * 16) + 8 * 32
    assert shape.token_cost.of(1) - shape.token_cost.attention == 2 * weights
    assert shape.token_cost.attention == 2 * 2 * (2 * 4)  # two products, two operations, half the pairs
