"""Looking at the options that a config passes through to vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.errors import ConfigError
from rlsys.plan import vllm_source
from rlsys.plan.model_folder import did_you_mean
from rlsys.rollout.vllm_settings import refuse_owned_arguments


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
