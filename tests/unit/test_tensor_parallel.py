"""What processes can share a model is known before an actor starts; and how many there are."""

from __future__ import annotations

import json

import pytest

from rlsys.actors.cluster import engine_bundle, other_bundles
from rlsys.config.load import apply_overrides
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.model_folder import check_model_folder
from rlsys.plan.split import cores_of
from rlsys.plan.tensor_parallel import check_tensor_parallel

LLAMA = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}


def config_of(*overrides: str) -> Config:
    return apply_overrides(Config(), ["algo.advantage={name: grpo}", "train.tensor_parallel=2", *overrides])


def folder_of(tmp_path, **keys: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **keys}))
    return str(tmp_path)


def refused(config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_tensor_parallel(config)
    assert caught.value.what == f"train.tensor_parallel={config.train.tensor_parallel}"
    return caught.value


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_heads_that_cannot_be_shared_evenly_are_shared_unevenly(tmp_path, zero_stage):
    check_tensor_parallel(config_of(f"model.path={folder_of(tmp_path)}", f"train.zero_stage={zero_stage}"))
    check_tensor_parallel(config_of("model.path=tiny", f"train.zero_stage={zero_stage}"))


def test_more_processes_than_key_value_heads_are_refused_under_zero_3_alone(tmp_path):
    keys = [f"model.path={folder_of(tmp_path)}", "train.tensor_parallel=4"]
    check_tensor_parallel(config_of(*keys, "train.zero_stage=2"))
    error = refused(config_of(*keys, "train.zero_stage=3"))
    assert error.got.startswith("3 key-value heads") and "train.tensor_parallel=3" in error.remedy
    refused(config_of("model.path=tiny", "train.tensor_parallel=4", "train.zero_stage=3"))


@pytest.mark.parametrize(
    ("kind", "got"),
    [("mixtral", "experts"), ("gpt2", "no plan"), ("phi3", "ways that DeepSpeed does not know")],
)
def test_models_that_deepspeed_cannot_cut_are_refused_with_the_reason(tmp_path, kind, got):
    path = folder_of(tmp_path, model_type=kind)
    error = refused(config_of(f"model.path={path}"))
    assert got in error.got and "model.path" in error.got and "train.tensor_parallel=1" in error.remedy
    check_tensor_parallel(config_of(f"model.path={path}", "train.tensor_parallel=1"))
    # who says how to cut it is believed
    says = 'train.deepspeed={tensor_parallel: {partition_config: {layer_specs: [{patterns: [".*o_proj.*"]}]}}}'
    check_tensor_parallel(config_of(f"model.path={path}", says))


def test_a_critic_of_another_kind_is_looked_at_too(tmp_path):
    path = folder_of(tmp_path, model_type="gpt2")
    keys = ["model.path=tiny", f"critic.path={path}"]
    check_tensor_parallel(config_of(*keys))  # no critic without an advantage that needs one
    assert "critic.path" in refused(config_of(*keys, "algo.advantage={name: gae}")).got


def test_adapters_are_refused_beside_it():
    assert "train.lora" in refused(config_of("model.path=tiny", "train.lora={r: 4}")).got


def test_every_process_has_its_place_and_its_cores():
    config = config_of("train.ranks=3", "train.cpus_per_rank=0.5", "rollout.replicas=2", "rollout.cpus_per_replica=2")
    assert config.train.processes == 6
    assert engine_bundle(config) == {"CPU": 2.0} and other_bundles(config) == [{"CPU": 0.5}] * 6
    assert cores_of(config, 2).trainer == 3.0


def test_activation_checkpointing_needs_a_class_that_can(monkeypatch):
    from transformers import LlamaForCausalLM

    from rlsys.plan import model_folder

    config = apply_overrides(Config(), ["train.activation_checkpointing=true"])
    model_folder._check_checkpointing(LlamaForCausalLM, config)
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError) as caught:
        model_folder._check_checkpointing(LlamaForCausalLM, config)
    assert caught.value.what == "train.activation_checkpointing"
    assert check_model_folder(apply_overrides(config, ["model.path=tiny"])).vocab_size == 128
