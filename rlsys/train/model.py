"""Loading and saving of Hugging Face causal language models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from rlsys.errors import ConfigError

_TRIED_TOKENS = 8  # of each of the two sequences that are tried in one row
_ROUNDING = 1e-3  # of the spread of logits; float32 gives 1e-6 to 1e-5, a sample that leaks a tenth and more
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


def load_model(path: str) -> PreTrainedModel:
    """The model in folder ``path``, float32, without dropout.

    Dropout would make the learner's log-probabilities those of no policy that an engine could have sampled from.

    Raises:
        ConfigError: its samples see one another where they share a row.
    """
    model = _load(AutoModelForCausalLM, path)
    check_rows_are_separate(model)
    return model.train()


def load_critic(path: str) -> PreTrainedModel:
    """The model in folder ``path`` with one number at each token in place of the vocabulary; it says 0 everywhere.

    Raises:
        ConfigError: transformers has no such class for the architecture, or samples see one another in a row.
    """
    told = get_verbosity()
    set_verbosity_error()  # it would warn that the head is new
    try:
        model = _load(AutoModelForTokenClassification, path, num_labels=1)
    except ValueError as error:
        raise ConfigError(
            "critic.path",
            got=f"{path}: {str(error).splitlines()[0]}",
            wanted="an architecture that transformers can give a head for single tokens",
            remedy="name another model, or choose advantages that need no critic",
        ) from error
    finally:
        set_verbosity(told)
    check_rows_are_separate(model)  # before the head says nothing
    head = model.get_submodule("score" if hasattr(model, "score") else "classifier")
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return model.train()


def _load(kind: Any, path: str, **settings: Any) -> PreTrainedModel:
    disable_progress_bar()
    config = AutoConfig.from_pretrained(path, **settings)
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    if settings:
        config.classifier_dropout = 0.0  # of heads; where it is not set they take 0.1
    config.use_cache = False
    model = kind.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation=_attention(config))
    assert isinstance(model, PreTrainedModel)
    return model


def _attention(config: PreTrainedConfig) -> str:
    """Both masks follow restarting positions exactly (packed rows). ``sdpa`` is the faster one, but it leaves out the
    cap on attention scores, which engines apply: a model with one (Gemma 2) would be another model here."""
    return "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"


def check_rows_are_separate(model: PreTrainedModel) -> None:
    """Two sequences in one row, positions restarting, must give the logits that each gives alone.

    Attention masks keep them apart, in most classes: some build theirs without looking at the positions, and what a
    convolution or a recurrent state carries on knows no beginning of a sample. Every gradient would silently be wrong.

    Raises:
        ConfigError: they do not.
    """
    tokens = torch.arange(2 * _TRIED_TOKENS).view(2, -1) % model.config.get_text_config().vocab_size
    positions = torch.arange(_TRIED_TOKENS).expand_as(tokens)
    with torch.no_grad():
        alone = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        row = model(input_ids=tokens.view(1, -1), position_ids=positions.reshape(1, -1), use_cache=False).logits
    difference = float((row.view_as(alone) - alone).abs().max() / alone.std())
    if not difference <= _ROUNDING:
        raise ConfigError(
            "model.path",
            got=f"{type(model).__name__}: a sample sees the one before it in its row (logits move by {difference:.2g} "
            "of their spread)",
            wanted="a class of transformers that keeps them apart where positions restart",
            remedy="choose another model: samples share rows in training",
        )


def save_model(model: PreTrainedModel, weights: Mapping[str, Tensor], source: str, folder: str) -> None:
    """Write ``weights`` as a plain Hugging Face folder: safetensors, with config and tokenizer as in ``source``.

    Args:
        model: names and groups the weights; its own parameters are not read.
        weights: full tensors by their names in files (``FullWeights``), the second name of a tied pair left out.
        source: the folder that the model was loaded from.
        folder: is made where it does not exist.
    """
    model.save_pretrained(
        folder, state_dict=dict(weights), save_original_format=False
    )  # the names are the files' already
    for file in Path(source).iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(file, Path(folder) / file.name)
    config_path = Path(folder) / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("torch_dtype", None)  # the older name of dtype; two different answers would mislead readers
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
