"""Which experts can be shared out, and which load can be balanced, is known before an actor starts."""

from __future__ import annotations

import json

import pytest

from rlsys.config.load import apply_overrides
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.experts import SHARED_OUT, check_experts

QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 6}


def config_of(tmp_path, *overrides: str, **keys: object) -> Config:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_MOE, **keys}))
    overrides = (f"model.path={tmp_path}", "train.ranks=6", "train.expert_parallel=2", *overrides)
    return apply_overrides(Config(), ["algo.advantage={name: grpo}", *overrides])


def refused(config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_experts(config)
    return caught.value


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_experts_that_divide_are_shared_out(tmp_path, zero_stage):
    check_experts(config_of(tmp_path, f"train.zero_stage={zero_stage}", "train.router_aux_coef=0.01"))
    check_experts(config_of(tmp_path, model_type="mixtral", num_local_experts=8))


@pytest.mark.parametrize(
    ("overrides", "got"),
    [
        (["train.ranks=4", "train.expert_parallel=4"], "6 experts"),
        (["train.ranks=3"], "3 ranks"),
        (["train.tensor_parallel=2"], "train.tensor_parallel=2 beside it"),
        (["train.zero_stage=3"], "train.zero_stage=3 beside it"),
        (["train.lora={r: 4}"], "train.lora beside it"),
        (["algo.reference_every_steps=5"], "algo.reference_every_steps=5 beside it"),
        (["model.path=tiny"], "a model without experts: tiny"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_the_reason(tmp_path, overrides, got):
    config = config_of(tmp_path, *overrides)
    error = refused(config)
    assert error.what == f"train.expert_parallel={config.train.expert_parallel}" and error.got.startswith(got)


def test_kinds_whose_names_do_not_lead_back_are_refused(tmp_path):
    assert "qwen2_moe" in refused(config_of(tmp_path, model_type="qwen2_moe")).got
    assert "without experts" in refused(config_of(tmp_path, model_type="llama", num_experts=None)).got


def test_a_load_that_nobody_has_is_not_balanced(tmp_path):
    keys = ["train.expert_parallel=1", "train.router_aux_coef=0.01"]
    check_experts(config_of(tmp_path, *keys))
    error = refused(config_of(tmp_path, *keys, "model.path=tiny"))
    assert error.what == "train.router_aux_coef=0.01" and "without experts" in error.got


def test_choices_of_experts_that_nobody_replays_are_not_asked_for(tmp_path):
    error = refused(config_of(tmp_path, "rollout.vllm={enable_return_routed_experts: true}"))
    assert error.what == "rollout.vllm.enable_return_routed_experts" and "Triton" in error.wanted
    gpus = ["rollout.vllm={enable_return_routed_experts: true}", "rollout.gpus_per_replica=1"]
    assert "Triton" not in refused(config_of(tmp_path, *gpus)).wanted


@pytest.mark.engines
def test_the_kinds_that_are_shared_out_are_among_those_of_deepspeed():
    from deepspeed.module_inject.auto_ep_presets.registry import get_preset, preset_name_for_hf_model_type

    for kind, name in SHARED_OUT.items():
        preset = get_preset(preset_name_for_hf_model_type(kind))
        assert preset.num_experts_attr == name
