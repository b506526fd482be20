"""Loading and saving of Hugging Face causal language models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


def load_model(path: str) -> PreTrainedModel:
    """The model in folder ``path``, float32, ``sdpa`` attention, without dropout.

    Dropout would make the learner's log-probabilities those of no policy that an engine could have sampled from.
    ``sdpa`` is the attention whose mask follows restarting positions exactly (packed rows).
    """
    disable_progress_bar()
    config = AutoConfig.from_pretrained(path)
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    config.use_cache = False
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation="sdpa")
    assert isinstance(model, PreTrainedModel)
    return model.train()


def save_model(model: PreTrainedModel, weights: Mapping[str, Tensor], source: str, folder: str) -> None:
    """Write ``weights`` as a plain Hugging Face folder: safetensors, with config and tokenizer as in ``source``.

    Args:
        model: names and groups the weights; its own parameters are not read.
        weights: full tensors by name, the second name of a tied pair left out.
        source: the folder that the model was loaded from.
        folder: is made where it does not exist.
    """
    model.save_pretrained(folder, state_dict=dict(weights))
    for file in Path(source).iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(file, Path(folder) / file.name)
    config_path = Path(folder) / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("torch_dtype", None)  # the older name of dtype; two different answers would mislead readers
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
