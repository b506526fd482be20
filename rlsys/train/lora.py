"""Low-rank adapters (LoRA, DoRA) through peft: what is trained, and what comes out merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlsys.errors import ConfigError

# keywords of LoraConfig that follow from how rlsys trains, and why
_OURS = {
    "task_type": "it is causal language modelling",
    "inference_mode": "adapters are trained here",
    "lora_dropout": "dropout would make the learner another policy than the one that sampled",
    "modules_to_save": "weights beside the adapters are not trained",
    "bias": "weights beside the adapters are not trained",
    "trainable_token_indices": "weights beside the adapters are not trained",
}


def check_lora(keywords: Mapping[str, Any]) -> None:
    """Raises ConfigError for keywords that peft does not take, or that are ours."""
    _config(keywords)


def with_adapters(model: PreTrainedModel, keywords: Mapping[str, Any]) -> Any:
    """The model with adapters at its linear layers (but its head), which alone have a gradient. It is the same model
    until they have learnt something.

    Raises:
        ConfigError: ``train.lora`` names no layer of the model.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(model, _config(keywords))
    except ValueError as error:
        raise ConfigError(
            "train.lora",
            got=f"{dict(keywords)}: {error}",
            wanted="layers of the model",
            remedy="see LoraConfig of peft",
        ) from error


def base_of(model: Any) -> PreTrainedModel:
    """The model of transformers below its adapters, which stay in it; itself where it has none."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    return base


def is_adapted(module: torch.nn.Module) -> bool:
    """Whether it is a layer with adapters of its own."""
    return hasattr(module, "base_layer") and hasattr(module, "merge")


@contextmanager
def merged(layer: Any) -> Iterator[dict[str, Tensor]]:
    """Weight and bias of an adapted layer with its adapters added in; the layer is as it was afterwards, to the bit.

    Every parameter of it must be whole here.
    """
    weight = layer.base_layer.weight.data
    before = weight.clone()
    with torch.no_grad():
        layer.merge()
    try:
        yield {name: parameter.data for name, parameter in layer.base_layer.named_parameters(recurse=False)}
    finally:
        layer.unmerge()
        weight.copy_(before)  # what is subtracted is not exactly what was added


def _config(keywords: Mapping[str, Any]) -> Any:
    from peft import LoraConfig

    for name, why in _OURS.items():
        if name in keywords:
            raise ConfigError(
                f"train.lora.{name}", got=repr(keywords[name]), wanted="no entry", remedy=f"leave it out: {why}"
            )
    try:
        return LoraConfig(**{"target_modules": "all-linear", **keywords}, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "train.lora", got=f"{dict(keywords)}: {error}", wanted="keywords of peft's LoraConfig", remedy="correct it"
        ) from error
