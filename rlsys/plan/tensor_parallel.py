"""Whether DeepSpeed's tensor parallel (AutoTP) can cut a model, known from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from rlsys.actors.algorithm import needs_of
from rlsys.algo.rows import Need
from rlsys.config.load import TINY
from rlsys.config.schema import Config, TrainSection
from rlsys.errors import ConfigError
from rlsys.models.tiny.model import make_random_model, make_tokenizer

# ways of cutting a layer, as transformers' plans name them, that DeepSpeed follows
STYLES = {
    "colwise",
    "colwise_rep",
    "colwise_gather_output",
    "rowwise",
    "replicated_with_grad_allreduce",
    "embedding_rowwise",
}
ALONE = "set train.tensor_parallel=1, and train.ranks and train.zero_stage=3 for a model that is too large for one"


def check_tensor_parallel(config: Config) -> None:
    """Raises ConfigError where ``train.tensor_parallel`` processes cannot share a model that is trained."""
    train = config.train
    if train.tensor_parallel == 1:
        return
    if train.lora is not None:
        raise ConfigError(
            f"train.tensor_parallel={train.tensor_parallel}",
            got="train.lora beside it",
            wanted="one of them: DeepSpeed does not cut layers that have adapters",
            remedy=f"leave train.lora out, or {ALONE}",
        )
    paths = {"model.path": config.model.path}
    if Need.CRITIC in needs_of(config) and config.critic.path is not None:
        paths["critic.path"] = config.critic.path
    for key, path in paths.items():
        _check_model(key, path, train)


def _check_model(key: str, path: str, train: TrainSection) -> None:
    model = config_of(path)
    passed = train.deepspeed.get("tensor_parallel", {})
    if not passed.get("partition_config") and not passed.get("preset_model"):  # else the user says how to cut it
        _check_plan(key, model, train)
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    if train.zero_stage == 3 and train.tensor_parallel > heads:
        raise ConfigError(
            f"train.tensor_parallel={train.tensor_parallel}",
            got=f"{heads} key-value heads in {path}, with ZeRO stage 3",
            wanted=f"at most {heads}: a process without a head has empty weights, which ZeRO stage 3 cannot gather",
            remedy=f"set train.tensor_parallel={heads} or less, or train.zero_stage=2",
        )


def _check_plan(key: str, model: Any, train: TrainSection) -> None:
    plan: Mapping[str, str] = getattr(model, "base_model_tp_plan", None) or {}
    strange = {style for style in plan.values() if style not in STYLES}
    if plan and not strange:
        return
    got = f"a model ({model.model_type}) whose class in transformers has no plan for it"
    if strange:
        experts = ": experts" if any("moe" in style for style in strange) else ""
        got = f"a model ({model.model_type}) to be cut in ways that DeepSpeed does not know{experts}"
    raise ConfigError(
        f"train.tensor_parallel={train.tensor_parallel}",
        got=f"{got} ({key})",
        wanted=f"layers that are cut in these ways: {', '.join(sorted(STYLES))}",
        remedy=f"{ALONE}; or say how to cut it in train.deepspeed.tensor_parallel.partition_config",
    )


def config_of(path: str) -> Any:
    """The config of the text model in a folder, or of the embedded one."""
    if path == TINY:
        with torch.device("meta"):
            return make_random_model(make_tokenizer()).config
    return AutoConfig.from_pretrained(path).get_text_config()
