"""Whether a mixture of experts can be trained as a config says, known from the model's config alone."""

from __future__ import annotations

from typing import Any

from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.tensor_parallel import config_of

# Kinds of models whose experts DeepSpeed shares out (its AutoEP), and the key of their number. It knows more kinds,
# with shared experts or biases of routers: to these it gives names that transformers does not know.
SHARED_OUT = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}
_NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts")


def check_experts(config: Config) -> None:
    """Raises ConfigError where ``train.expert_parallel`` or ``train.router_aux_coef`` cannot be kept to, or engines are
    asked for the experts that they chose."""
    train = config.train
    _check_replay(config)
    if train.expert_parallel == 1 and train.router_aux_coef == 0.0:
        return
    model = config_of(config.model.path)
    key = f"train.router_aux_coef={train.router_aux_coef:g}"
    if train.expert_parallel > 1:
        key = f"train.expert_parallel={train.expert_parallel}"
    if not any(getattr(model, name, None) for name in _NUMBERS):
        raise ConfigError(
            key,
            got=f"a model without experts: {config.model.path}",
            wanted="a mixture of experts",
            remedy=f"leave {key.partition('=')[0]} out, or choose another model",
        )
    if train.expert_parallel > 1:
        _check_expert_parallel(config, model, key)


def _check_replay(config: Config) -> None:
    asked = config.rollout.vllm.get("enable_return_routed_experts")
    if not asked:
        return
    on_cpu = (
        "vLLM returns them from its model runner V2 alone, which needs Triton with a backend for CPUs; and "
        if config.rollout.gpus_per_replica == 0
        else ""
    )
    raise ConfigError(
        "rollout.vllm.enable_return_routed_experts",
        got=repr(asked),
        wanted=f"engines that keep their choices of experts to themselves: {on_cpu}the learner does not replay them",
        remedy="leave it out: rollout_corr/* shows how far learner and engines are apart",
    )


def _check_expert_parallel(config: Config, model: Any, key: str) -> None:
    train = config.train
    beside = {
        f"train.tensor_parallel={train.tensor_parallel}": train.tensor_parallel > 1,
        "train.zero_stage=3": train.zero_stage == 3,
        "train.lora": train.lora is not None,
        f"algo.reference_every_steps={config.algo.reference_every_steps}": config.algo.reference_every_steps > 0,
    }
    for other, is_set in beside.items():
        if is_set:
            raise ConfigError(
                key,
                got=f"{other} beside it",
                wanted="one of them: the learner does not cut experts in two ways, nor adapt or copy those of others",
                remedy=f"set train.expert_parallel=1, or leave {other.partition('=')[0]} out",
            )
    name = SHARED_OUT.get(model.model_type)
    if name is None:
        raise ConfigError(
            key,
            got=f"a model of type {model.model_type} ({config.model.path})",
            wanted=f"one whose experts DeepSpeed can share out under names that lead back: {', '.join(SHARED_OUT)}",
            remedy="set train.expert_parallel=1; train.ranks and train.zero_stage=3 spread any model",
        )
    for what, number in (("ranks", train.ranks), ("experts", getattr(model, name))):
        if number % train.expert_parallel:
            raise ConfigError(
                key,
                got=f"{number} {what}, which it does not divide",
                wanted="a number that divides train.ranks and the number of experts",
                remedy=f"set train.expert_parallel to a divisor of {number}",
            )
