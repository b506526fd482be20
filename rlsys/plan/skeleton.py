"""A model without its weights: the names and shapes that the learner will have."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlsys.config.load import TINY
from rlsys.config.schema import Config
from rlsys.models.tiny.model import make_random_model, make_tokenizer
from rlsys.train.frozen import freeze
from rlsys.train.lora import leaves_base_alone, with_adapters


def skeleton_of(path: str) -> PreTrainedModel:
    """The model that is trained where ``model.path`` is ``path``, its tensors without memory."""
    with torch.device("meta"):
        if path == TINY:
            return make_random_model(make_tokenizer())
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()
    return model


def count_trained(config: Config, num_parameters: int) -> int:
    """Parameters of the policy that checkpoints hold: those that are trained, unless the others are no more what the
    model's files have. ``num_parameters``: all of the model's."""
    lora, frozen = config.train.lora, config.train.frozen
    if not (frozen if lora is None else leaves_base_alone(lora)):
        return num_parameters
    model = skeleton_of(config.model.path)
    if lora is not None:
        model = with_adapters(model, lora)
    freeze(model, frozen)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
