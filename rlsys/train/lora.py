"""Low-rank adapters (LoRA, DoRA) through peft: what is trained, and what comes out, merged or by itself.

Legend: R rank of an adapter, I and O inputs and outputs of its layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlsys.errors import ConfigError
from rlsys.train.snapshot import host_copies

_NAME = "default"  # of an adapter, where peft is told none
_PREFIX = "base_model.model"  # of every name in peft's files
PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal")  # of init_lora_weights; others change the base model too
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


def leaves_base_alone(keywords: Mapping[str, Any]) -> bool:
    """Whether the base stays the model that it was. Some ways to begin (PiSSA, OLoRA) take out of it what the adapters
    begin with."""
    return keywords.get("init_lora_weights", True) in PLAIN_BEGINNINGS


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


def ranks_of_layers(model: Any) -> dict[str, int]:
    """Rank of the adapter at each layer that has one, by the layer's name in the model of transformers."""
    return {name: layer.r[_NAME] for name, layer in base_of(model).named_modules() if is_adapted(layer)}


def adapter_weights(model: Any, *, deepspeed: ModuleType, zero_stage: int) -> Iterator[Mapping[str, Tensor]]:
    """The two matrices of every adapted layer, named as in peft's files: ``lora_A`` [R, I], and ``lora_B`` [O, R] times
    the layer's scaling, so that their product is what is added to the layer's weight.

    A collective under ZeRO-3: every rank runs it to its end. A layer's are valid until the next one is asked for.
    """
    for name, layer in base_of(model).named_modules():
        if not is_adapted(layer):
            continue
        down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        with deepspeed.zero.GatheredParameters([down, up]) if zero_stage == 3 else nullcontext():
            yield {
                f"{_PREFIX}.{name}.lora_A.weight": down.data,
                f"{_PREFIX}.{name}.lora_B.weight": up.data * layer.scaling[_NAME],
            }


def save_adapter(model: Any, folder: str, *, deepspeed: ModuleType, zero_stage: int, rank: int) -> None:
    """Write the adapter as peft does, for whoever has the base model. A collective under ZeRO-3; rank 0 writes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())) if zero_stage == 3 else nullcontext():
        if rank != 0:
            return
        whole = host_copies(trained)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy(model.peft_config[_NAME])
    settings.inference_mode = True
    settings.save_pretrained(folder)


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
