"""Looking at the options that a config passes through to vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.config.schema import RolloutSection
from rlsys.errors import ConfigError
from rlsys.plan import vllm_source
from rlsys.plan.model_folder import did_you_mean
from rlsys.rollout.vllm_settings import num_workers, refuse_owned_arguments


def check_engine_arguments(key: str, given: Mapping[str, Any], owned: Mapping[str, str]) -> None:
    """The names under the config key ``key`` are arguments of vLLM's engine, and none that rlsys sets itself.

    Args:
        owned: those that rlsys sets, and where they come from.

    Raises:
        ConfigError: the first that is not.
    """
    refuse_owned_arguments(given, key, owned)
    known = vllm_source.engine_arguments()
    for name in given:
        if known and name not in known:
            raise ConfigError(
                f"{key}.{name}",
                got="no argument of vLLM's engine",
                wanted="an argument of vllm's AsyncEngineArgs, with underscores",
                remedy=did_you_mean(name, known, "remove it"),
            )


PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")


def check_engine_workers(rollout: RolloutSection) -> None:
    """Ray reserves what the processes of one engine compute on: a core or more each, or exactly one GPU each. Less than
    one core for all of them is meant as it stands: they share the cores with others.

    Raises:
        ConfigError: it would not, or a number of processes is none.
    """
    for name in PARALLEL_SIZES:
        size = rollout.vllm.get(name, 1)
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"rollout.vllm.{name}", got=repr(size), wanted="a number from 1", remedy="correct it")
    workers = num_workers(rollout.vllm)
    is_gpu = rollout.gpus_per_replica > 0
    reserved = rollout.gpus_per_replica if is_gpu else rollout.cpus_per_replica
    if workers > 1 and (reserved != workers if is_gpu else 1 <= reserved < workers):
        key = "rollout.gpus_per_replica" if is_gpu else "rollout.cpus_per_replica"
        raise ConfigError(
            key,
            got=f"{reserved:g}, for the {workers} processes of one engine (rollout.vllm: {', '.join(PARALLEL_SIZES)})",
            wanted=f"{workers}" if is_gpu else f"{workers} or more, or less than 1 to share cores with others",
            remedy=f"set {key}={workers}, or fewer processes",
        )
