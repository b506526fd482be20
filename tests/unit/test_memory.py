"""Whether a learner fits into memory, by numbers that can be worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.load import apply_overrides
from rlsys.config.presets import resolve
from rlsys.config.schema import Config, TrainSection
from rlsys.errors import ConfigError
from rlsys.models.shape import ModelShape
from rlsys.plan import facts, memory
from rlsys.plan.memory import adapter_parameters, check_memory, predict

SHAPE = ModelShape(layers=2, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=16, vocab_size=32)
LARGE = ModelShape(layers=30, width=576, heads=9, kv_heads=3, head_width=64, mlp_width=1536, vocab_size=49_152)
PARAMETERS, LARGE_PARAMETERS = 1000, 134_515_008
GIB = 1 << 30


def config_of(tmp_path, *overrides: str) -> Config:
    keys = ["data.task={name: reversed_sum}", f"run.root={tmp_path}/runs", "run.name=a", *overrides]
    return resolve(apply_overrides(Config(), keys))


def predicted(shape: ModelShape = SHAPE, number: int = PARAMETERS, **keys):
    return predict(number, shape, TrainSection.model_validate(keys), tokens=100, longest=10)


BF16 = "bfloat16"


@pytest.mark.parametrize(
    ("keys", "weights", "gradients", "optimizer"),
    [
        ({}, 4000, 4000, 8000),
        ({"optimizer": {"name": "sgd"}}, 4000, 4000, 0),
        ({"dtype": BF16}, 2000, 2000, 12_000),
        ({"zero_stage": 1, "ranks": 4}, 4000, 4000, 3000),
        ({"zero_stage": 2, "ranks": 4}, 4000, 1000, 3000),
        ({"zero_stage": 3, "ranks": 4}, 1000, 1000, 3000),
        ({"zero_stage": 3, "ranks": 4, "dtype": BF16}, 500, 500, 3000),
        ({"tensor_parallel": 2}, 2000, 2000, 4000),
        ({"zero_stage": 1, "offload": "optimizer"}, 4000, 4000, 12_000),
        ({"zero_stage": 1, "offload": "optimizer", "gpus_per_rank": 1}, 4000, 4000, 0),
        ({"zero_stage": 3, "offload": "optimizer+params", "gpus_per_rank": 1}, 0, 4000, 0),
    ],
)
def test_what_stays_is_counted_by_parameters(keys, weights, gradients, optimizer):
    found = predicted(**keys)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert found.total == sum((weights, gradients, optimizer, found.activations, found.buffers, found.process))


def test_adapters_alone_have_gradients_and_moments():
    """Each layer: queries and output 8 + 8, keys and values 8 + 4, three of 8 + 16; rank 4."""
    assert adapter_parameters(SHAPE, {"r": 4}) == 4 * 2 * (2 * 16 + 2 * 12 + 3 * 24)
    found = predicted(lora={"r": 4})
    assert (found.weights, found.gradients, found.optimizer) == (4000, 4 * 1024, 8 * 1024)


def test_a_layer_keeps_its_activations_until_the_backward_pass():
    """A token: two layers of 6 x 8 + 5 x 8 + 4 x 16, and 2 x 8 + 3 x 16 on the way back; 4 bytes each."""
    shape_alone = memory._activations(SHAPE, TrainSection(), 100, 10, 4)
    assert shape_alone == 100 * (2 * 152 + 64) * 4 + 100 * 10 * 5
    again = memory._activations(SHAPE, TrainSection(activation_checkpointing=True), 100, 10, 4)
    assert again == 100 * (2 * 8 + 152 + 64) * 4 + 100 * 10 * 5


@given(
    keys=st.fixed_dictionaries(
        {
            "zero_stage": st.integers(0, 2),
            "ranks": st.integers(1, 8),
            "tensor_parallel": st.integers(1, 4),
            "activation_checkpointing": st.booleans(),
        }
    ),
    tokens=st.integers(500, 5000),
)
def test_what_is_meant_to_save_memory_does(keys, tokens):
    def total(tokens: int = tokens, **changes) -> int:
        train = TrainSection.model_validate(keys | changes)
        return predict(LARGE_PARAMETERS, LARGE, train, tokens=tokens, longest=500).total

    assert total(activation_checkpointing=True) <= total(activation_checkpointing=False)
    assert total(tokens - 100) < total() < total(tokens + 100)
    assert total(tensor_parallel=keys["tensor_parallel"] + 1) < total()
    assert total(zero_stage=2) <= total(zero_stage=1)
    assert total(dtype=BF16, activation_checkpointing=False) <= total(activation_checkpointing=False)


def test_what_cannot_fit_is_refused_with_the_key_that_helps_most(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(memory, "count_parameters", lambda path: LARGE_PARAMETERS)
    monkeypatch.setattr(memory, "_shape", lambda path: LARGE)
    monkeypatch.setattr(memory, "_ram_bytes", lambda: 3 * GIB)
    with pytest.raises(ConfigError) as caught:
        check_memory(config_of(tmp_path, "train.tokens_per_microbatch=4096"), sequence=512)
    error = caught.value
    assert error.got == "3.00 GiB of this machine" and "at the peak" in error.wanted
    assert "train.activation_checkpointing=true helps most" in error.remedy
    lower = config_of(tmp_path, "train.tokens_per_microbatch=4096", "train.activation_checkpointing=true")
    plan = check_memory(lower, sequence=512)
    assert plan.memory_bytes == 3 * GIB and plan.processes == 1
    assert 3 * GIB < plan.learner.total <= memory.FACTOR * 3 * GIB
    assert facts.of_memory(plan).endswith("3.00 GiB are there: it may not fit")


def test_all_processes_on_one_machine_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = config_of(tmp_path, "train.ranks=2", "train.prompts_per_batch=4")
    plan = check_memory(config, sequence=64)
    assert plan.processes == 2 and "2 processes, each about" in facts.of_memory(plan)
    monkeypatch.setattr(memory, "_ram_bytes", lambda: int(1.6 * plan.learner.total))
    assert "it may not fit" in facts.of_memory(check_memory(config, sequence=64))
    monkeypatch.setattr(memory, "_ram_bytes", lambda: int(1.4 * plan.learner.total))
    with pytest.raises(ConfigError, match="2 x "):
        check_memory(config, sequence=64)


def test_a_cluster_s_memory_is_not_this_machine_s(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_ram_bytes", lambda: 1)
    plan = check_memory(config_of(tmp_path, "ray.address=10.0.0.1:6379"), sequence=64)
    assert plan.memory_bytes is None and "are there" not in facts.of_memory(plan)


def test_models_around_the_policy_take_their_own(tmp_path):
    alone, with_critic, with_reference = (
        check_memory(config_of(tmp_path, *keys), sequence=64).learner
        for keys in ((), ("algo.advantage={name: gae}",), ("algo.kl={name: k3}",))
    )
    assert with_critic.weights == 2 * alone.weights and with_critic.optimizer == 2 * alone.optimizer
    assert with_reference.weights == 2 * alone.weights and with_reference.optimizer == alone.optimizer
