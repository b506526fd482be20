"""What a vLLM engine is started with: the contract's arguments are ours, the others the user's."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from rlsys.errors import ConfigError
from rlsys.rollout.vllm_settings import OWNED_ARGUMENTS, AdapterRoom, VllmSettings, engine_environment, num_workers


def _settings(**vllm) -> VllmSettings:
    return VllmSettings(
        model="m",
        dtype="float32",
        max_model_len=32,
        slots=8,
        seed=0,
        start_timeout_s=1,
        timeout_s=1,
        vllm=vllm,
    )


def test_an_argument_that_rlsys_sets_itself_is_refused_by_name():
    for key in OWNED_ARGUMENTS:
        with pytest.raises(ConfigError) as refused:
            _settings(**{key: 7})
        assert refused.value.what == f"rollout.vllm.{key}"
    with pytest.raises(ConfigError, match=r"rollout\.slots"):
        _settings(max_num_seqs=7)


def test_other_arguments_win_over_the_defaults():
    arguments = _settings(enforce_eager=False, gpu_memory_utilization=0.5).arguments(on_cpu=True)
    assert arguments["enforce_eager"] is False and arguments["gpu_memory_utilization"] == 0.5
    assert _settings().arguments(on_cpu=True)["enforce_eager"] is True
    owned = set(_settings().arguments(on_cpu=True)) | set(AdapterRoom(rank=4, modules=("q_proj",)).arguments())
    assert owned >= set(OWNED_ARGUMENTS) - {"weight_transfer_config", "tokenizer"}


def test_there_is_room_for_one_adapter_where_versions_are_adapters_and_for_none_elsewhere():
    settings = replace(_settings(), adapter=AdapterRoom(rank=12, modules=("q_proj", "v_proj")))
    arguments = settings.arguments(on_cpu=True)
    assert arguments["enable_lora"] is True and arguments["max_loras"] == 1 and arguments["max_lora_rank"] == 16
    assert arguments["lora_target_modules"] == ["q_proj", "v_proj"]
    assert "enable_lora" not in _settings().arguments(on_cpu=True)


def test_the_probe_always_has_room():
    arguments = _settings().arguments(on_cpu=True)
    assert arguments["max_num_seqs"] == 8  # two probe sequences go before the rollouts, which line up again at a swap
    assert replace(_settings(), update_mode="keep").arguments(on_cpu=True)["max_num_seqs"] == 8 + 2  # beside full slots
    assert replace(_settings(), slots=1).arguments(on_cpu=True)["max_num_seqs"] == 2
    assert arguments["max_model_len"] == 48 + 1  # one probe sequence and the token that vLLM samples after it


def test_settings_and_environment_need_no_engine():
    code = "import sys, rlsys.rollout.vllm_settings; print(sorted({'torch', 'vllm', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert engine_environment(cpus=0.5, gpus=0)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in engine_environment(cpus=4, gpus=1)


def test_the_processes_of_one_engine_share_its_cores_and_are_its_own():
    assert num_workers({}) == 1 and num_workers({"tensor_parallel_size": 2, "pipeline_parallel_size": 3}) == 6
    assert engine_environment(cpus=8, gpus=0, workers=2)["OMP_NUM_THREADS"] == "4"
    assert engine_environment(cpus=3, gpus=0, workers=2)["OMP_NUM_THREADS"] == "1"
    # not actors that vLLM asks Ray for, unless the user wants that
    assert _settings(tensor_parallel_size=2).arguments(on_cpu=False)["distributed_executor_backend"] == "mp"
    ray = _settings(tensor_parallel_size=2, distributed_executor_backend="ray")
    assert ray.arguments(on_cpu=False)["distributed_executor_backend"] == "ray"
    assert "distributed_executor_backend" not in _settings().arguments(on_cpu=True)
