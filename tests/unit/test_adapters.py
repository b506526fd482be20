"""Which adapters engines serve by themselves, and which they get merged, is decided before an actor starts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import pytest

from rlsys.actors.inputs import Inputs
from rlsys.actors.setup import engine_settings
from rlsys.config.load import apply_overrides
from rlsys.config.presets import resolve
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan import vllm_source
from rlsys.plan.adapters import AdapterPlan, decide, plan_adapters
from rlsys.plan.facts import of_adapters
from rlsys.plan.skeleton import count_trained
from rlsys.plan.space import check_space
from rlsys.prompts.source import PromptSource
from rlsys.rollout.vllm_settings import AdapterRoom

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def plan_of(*words: str) -> AdapterPlan:
    plan = plan_adapters(apply_overrides(Config(), ["model.path=tiny", *words]))
    assert plan is not None
    return plan


def decided(**changed: Any) -> AdapterPlan:
    given: dict[str, Any] = {
        "ranks": {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.mlp.up_proj": 12},
        "engine": {},
        "served": LINEAR,
        "architecture": "LlamaForCausalLM",
    }
    return decide(**(given | changed))


def test_without_adapters_there_is_nothing_to_decide():
    assert plan_adapters(apply_overrides(Config(), ["model.path=tiny"])) is None


def test_engines_keep_room_for_the_largest_rank_and_for_the_layers_that_have_one_alone():
    assert decided() == AdapterPlan(room=AdapterRoom(rank=12, modules=("q_proj", "up_proj")))
    assert plan_of("train.lora={r: 4}") == AdapterPlan(room=AdapterRoom(rank=4, modules=tuple(sorted(LINEAR))))
    words = "train.lora={r: 4, target_modules: '.*layers.1.*(q|v)_proj', rank_pattern: {q_proj: 9}, use_rslora: true}"
    assert plan_of(words) == AdapterPlan(room=AdapterRoom(rank=9, modules=("q_proj", "v_proj")))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["train.lora={r: 4}", "rollout.weight_channel=nccl"], "weight_channel=nccl fills"),
        (["train.lora={r: 4, use_dora: true}"], "use_dora"),
        (["train.lora={r: 4, lora_bias: true}"], "lora_bias"),
        (["train.lora={r: 4, init_lora_weights: pissa}"], "pissa changes the base"),
        (["train.lora={r: 4, target_modules: [q_proj, lm_head]}"], "at lm_head of Qwen2ForCausalLM"),
        (["train.lora={r: 513}"], "rank 513 is above 512"),
        (["train.lora={r: 4}", "rollout.vllm={load_format: dummy}"], "rollout.vllm.load_format"),
        (["train.lora={r: 4}", "rollout.vllm={quantization: fp8}"], "rollout.vllm.quantization"),
        (["train.lora={r: 4}", "rollout.vllm={pipeline_parallel_size: 2}"], "pipeline stages"),
    ],
)
def test_what_vllm_does_not_serve_goes_merged_and_the_user_is_told_why_in_one_sentence(words, why):
    plan = plan_of(*words)
    assert plan.room is None and why in plan.why_merged
    assert of_adapters(plan) == f"weight sync: engines get the adapters merged into all weights: {plan.why_merged}"


def test_an_architecture_that_vllm_serves_no_adapters_on_goes_merged():
    assert decided(served=set(), architecture="GPT2LMHeadModel").why_merged.endswith("no adapters on GPT2LMHeadModel")
    assert decided(engine={"load_format": "auto", "tensor_parallel_size": 2}).room is not None


def test_a_model_with_experts_goes_merged(tmp_path):
    tree = {"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 1, "architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    plan = plan_of(f"model.path={tmp_path}", "train.lora={r: 4}")
    assert plan == AdapterPlan(why_merged="MixtralForCausalLM has experts")


def test_adapters_at_no_layer_of_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"train\.lora"):
        plan_of("train.lora={r: 4, target_modules: [query]}")


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("LlamaForCausalLM", LINEAR),
        ("Qwen2ForCausalLM", LINEAR),
        ("MistralForCausalLM", LINEAR),  # as its parent
        ("GPT2LMHeadModel", set()),
        ("NoSuchModel", set()),
    ],
)
def test_where_vllm_takes_adapters_is_read_from_its_source(architecture, layers):
    assert vllm_source.adapter_layers(architecture) == layers


def test_space_is_that_of_what_is_published_and_saved(tmp_path):
    """A tiny Qwen2 of four layers: every layer's adapters of rank 4, in float32 with two moments."""
    config = resolve(apply_overrides(Config(), ["model.path=tiny", "train.lora={r: 4}", f"run.root={tmp_path}"]))
    layer = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384)  # in and out of q and o, k and v, the MLP's three
    assert count_trained(config, 800_000) == 4 * 4 * layer
    space = check_space(config, adapters_alone=True)
    assert space.checkpoint_bytes == 12 * 4 * 4 * layer
    assert check_space(config).shm_bytes >= space.shm_bytes
    assert count_trained(apply_overrides(config, ["train.lora={r: 4, init_lora_weights: pissa}"]), 800_000) == 800_000


def test_both_sides_are_told_of_adapters_alone():
    config = apply_overrides(Config(), ["model.path=tiny", "train.lora={r: 4}"])
    source = cast(PromptSource, None)
    inputs = Inputs(model_path="m", longest_prompt=8, pad_token_id=0, reward_path="", source=source)
    room = plan_of("train.lora={r: 4}").room
    assert engine_settings(config, replace(inputs, adapter_room=room), 0).adapter == room
    assert engine_settings(config, inputs, 0).adapter is None
