"""Whether engines serve the adapters that are trained, on a base that they load once, or are given them merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlsys.config.schema import Config
from rlsys.plan import vllm_source
from rlsys.plan.skeleton import skeleton_of
from rlsys.rollout.vllm_settings import LORA_RANKS, AdapterRoom
from rlsys.train.lora import leaves_base_alone, ranks_of_layers, with_adapters
from rlsys.weights.channel import NATIVE

# Keywords of LoraConfig that vLLM's adapters follow, or that say no more than where adapters are and how they begin.
# Any other one that is set makes another kind of adapter.
SERVED = {
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
}
# Arguments of the engine by which it would not hold the base model that the learner has.
OTHER_BASE = ("load_format", "quantization", "hf_overrides", "hf_config_path", "model_impl", "speculative_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterPlan:
    """How adapters get to the engines.

    Attributes:
        room: what an engine keeps room for; None where it gets them merged into all weights.
        why_merged: the reason for that; empty where there is none.
    """

    room: AdapterRoom | None = None
    why_merged: str = ""


def plan_adapters(config: Config) -> AdapterPlan | None:
    """None where no adapters are trained.

    Raises:
        ConfigError: ``train.lora`` names no layer of the model.
    """
    if config.train.lora is None:
        return None
    skeleton = skeleton_of(config.model.path)
    architecture = (skeleton.config.architectures or [type(skeleton).__name__])[0]
    why = why_another_kind(config.train.lora)
    if not why and config.rollout.weight_channel in NATIVE:
        why = f"rollout.weight_channel={config.rollout.weight_channel} fills an engine's own weights only"
    if not why and any(name.endswith(".experts") for name, _ in skeleton.named_modules()):
        why = f"{architecture} has experts"
    if why:  # before adapters are made: some begin with arithmetic on the weights
        return AdapterPlan(why_merged=why)
    return decide(
        ranks=ranks_of_layers(with_adapters(skeleton, config.train.lora)),
        engine=config.rollout.vllm,
        served=vllm_source.adapter_layers(architecture),
        architecture=architecture,
    )


def why_another_kind(lora: Mapping[str, Any]) -> str:
    """Why ``train.lora`` makes adapters that vLLM does not serve; empty where it does."""
    if not leaves_base_alone(lora):
        return f"train.lora.init_lora_weights={lora['init_lora_weights']} changes the base model too"
    others = [name for name, value in lora.items() if value and name not in SERVED and name != "init_lora_weights"]
    return f"vLLM does not serve adapters with {', '.join(others)}" if others else ""


def decide(
    *, ranks: Mapping[str, int], engine: Mapping[str, Any], served: Collection[str], architecture: str
) -> AdapterPlan:
    """The one place where it is decided.

    Args:
        ranks: of the adapter at each layer that has one, by the layer's full name.
        engine: further arguments of the engine.
        served: last parts of the names of layers at which vLLM serves adapters in this architecture.
    """
    names = sorted({name.rpartition(".")[2] for name in ranks})
    rank = max(ranks.values())
    why = ""
    if changed := [key for key in OTHER_BASE if engine.get(key) not in (None, "auto")]:
        why = f"rollout.vllm.{changed[0]} gives the engines another base model than the learner's"
    elif engine.get("pipeline_parallel_size", 1) != 1:
        why = "an engine in pipeline stages does not get an adapter whole"
    elif not served:
        why = f"vLLM serves no adapters on {architecture}"
    elif strange := [name for name in names if name not in served]:
        why = f"vLLM serves no adapters at {', '.join(strange)} of {architecture}"
    elif rank > LORA_RANKS[-1]:
        why = f"rank {rank} is above {LORA_RANKS[-1]}, the largest that vLLM has room for"
    return AdapterPlan(why_merged=why) if why else AdapterPlan(room=AdapterRoom(rank=rank, modules=tuple(names)))
