"""Looking into a model's folder: can learner and engines hold what is in it? Loads no weights, imports no vllm."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from rlsys.config.load import TINY
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.models.tiny.model import MAX_POSITIONS, VOCAB_SIZE, make_tokenizer
from rlsys.plan import vllm_source

# without one of these, transformers makes up an empty vocabulary from tokenizer_config.json alone
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
RECURRENT_LAYERS = {"linear_attention", "conv"}  # as transformers names them in ``layer_types``
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What the checks of a run need to know of its model.

    Attributes:
        max_positions: longest context, tokens; None where the model has no limit.
        vocab_size: rows of its embedding.
    """

    max_positions: int | None
    vocab_size: int


def check_model_folder(config: Config, *, is_trained: bool = True) -> ModelFacts:
    """The folder holds a causal LM with weights and tokenizer that the learner can train and the engines can serve.

    Args:
        is_trained: False where it is only served.

    Raises:
        ConfigError: it does not.
    """
    if config.model.path == TINY:  # made at first use
        return ModelFacts(max_positions=MAX_POSITIONS, vocab_size=VOCAB_SIZE)
    folder = Path(config.model.path)
    if not folder.is_dir():
        raise ConfigError(
            "model.path",
            got=f"{folder} is no folder",
            wanted="a Hugging Face folder of a causal LM, or tiny",
            remedy="download the model and give its folder, or make one: rlsys make-model tiny OUT",
        )
    tree = _read_json(folder / "config.json", "the config.json of a Hugging Face model")
    model_class = _check_kind(folder, tree)
    model = _load_config(folder)
    if is_trained:
        _check_learner_can_train(model_class, tree, model)
        _check_checkpointing(model_class, config)
    _check_engine_can_serve(folder, model_class, tree)
    _check_files(folder)
    if config.rollout.gpus_per_replica == 0:
        _check_head_size(model)
    _check_heads_divide(model, config.rollout.vllm.get("tensor_parallel_size", 1))
    return ModelFacts(max_positions=getattr(model, "max_position_embeddings", None), vocab_size=model.vocab_size)


def load_tokenizer(config: Config) -> Any:
    """Raises ConfigError where the folder's tokenizer does not load."""
    if config.model.path == TINY:
        return make_tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.model.path)
    except Exception as error:  # of any kind: the libraries below raise what a broken file makes them stumble over
        raise ConfigError(
            "model.path",
            got=f"a tokenizer in {config.model.path} that does not load: {type(error).__name__}: {error}",
            wanted="a tokenizer of transformers",
            remedy="write it anew with save_pretrained",
        ) from error


def check_vocabulary(tokenizer: Any, model: ModelFacts) -> None:
    """Every token that a prompt may hold has a row in the embedding (rows beyond them are fine)."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= model.vocab_size:
        raise ConfigError(
            "model.path",
            got=f"a tokenizer with tokens up to {largest}, a model with an embedding of {model.vocab_size} rows",
            wanted=f"tokens up to {model.vocab_size - 1}",
            remedy="take the tokenizer that belongs to the model, or widen the model: resize_token_embeddings",
        )


def did_you_mean(name: str, known: Collection[str], otherwise: str) -> str:
    """A remedy: the nearest of the known names, or ``otherwise``."""
    nearest = difflib.get_close_matches(name, sorted(known), 1, 0.5)
    return f"did you mean {nearest[0]}?" if nearest else otherwise


def _check_kind(folder: Path, tree: Mapping[str, Any]) -> Any:
    """Returns the class of transformers that the learner will load."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = tree.get("model_type")
    if tree.get("is_encoder_decoder"):
        raise ConfigError(
            "model.path",
            got=f"an encoder-decoder model ({kind}) in {folder}",
            wanted="a decoder alone: a causal LM",
            remedy="choose a causal LM",
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            "model.path",
            got=f"model_type {kind!r} in {folder / 'config.json'}",
            wanted="a type of causal LM that the installed transformers knows",
            remedy=did_you_mean(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "choose another model"),
        )
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def _check_learner_can_train(model_class: Any, tree: Mapping[str, Any], model: Any) -> None:
    name = model_class.__name__
    quantized = tree.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise ConfigError(
            "model.path",
            got=f"quantised weights ({method or 'quantization_config'})",
            wanted="weights in float32, bfloat16 or float16: quantised ones cannot be trained",
            remedy="take the model before its quantisation, or dequantise it and save it with save_pretrained",
        )
    kinds = RECURRENT_LAYERS & set(getattr(model, "layer_types", None) or ())
    if model_class._is_stateful or kinds:
        raise ConfigError(
            "model.path",
            got=f"{name}, which carries a state from token to token ({', '.join(sorted(kinds)) or 'recurrent layers'})",
            wanted="a model in which only attention looks back, since samples share rows in training",
            remedy="choose a model without recurrent or convolution layers",
        )
    if not model_class._supports_sdpa:
        raise ConfigError(
            "model.path",
            got=f"{name}, whose attention is its own",
            wanted="a class of the installed transformers that takes scaled_dot_product_attention (_supports_sdpa)",
            remedy="choose another model",
        )


def _check_checkpointing(model_class: Any, config: Config) -> None:
    if config.train.activation_checkpointing and not model_class.supports_gradient_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing",
            got=f"true with {model_class.__name__}",
            wanted="a class of transformers that can (supports_gradient_checkpointing)",
            remedy="leave it out, and lower train.tokens_per_microbatch where memory is short",
        )


def _check_engine_can_serve(folder: Path, model_class: Any, tree: Mapping[str, Any]) -> None:
    """vLLM knows the architecture, or falls back to the class in transformers, as it does where it has none of its own
    and the class lets its attention be replaced."""
    named = tree.get("architectures")
    if not isinstance(named, list) or not named:
        raise ConfigError(
            "model.path",
            got=f"no architectures in {folder / 'config.json'}",
            wanted="the name of the model's class, by which an engine finds its own",
            remedy=f'write "architectures": ["{model_class.__name__}"] into it',
        )
    text, others = vllm_source.architectures()
    architecture = str(named[0])
    falls_back = architecture == model_class.__name__ and model_class.is_backend_compatible()
    if not text or architecture in text or (falls_back and architecture not in others):
        return
    raise ConfigError(
        "model.path",
        got=f"architecture {architecture!r} in {folder / 'config.json'}",
        wanted="a text-generation architecture that the installed vLLM serves",
        remedy=did_you_mean(architecture, text, "choose another model"),
    )


def _check_files(folder: Path) -> None:
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise ConfigError(
            "model.path",
            got=f"no weights in {folder}",
            wanted=" or ".join(WEIGHT_PATTERNS),
            remedy="download the model's weights too, or write them with save_pretrained",
        )
    for index in sorted(folder.glob("*.index.json")):
        listed = _read_json(index, "an index of weights").get("weight_map")
        files = sorted({str(name) for name in listed.values()}) if isinstance(listed, Mapping) else []
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                "model.path",
                got=f"{index}: {len(missing)} of its {len(files)} files missing: {', '.join(missing[:3])}",
                wanted="every file of weights that the index lists",
                remedy="download the model's weights again, or write them with save_pretrained",
            )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            "model.path",
            got=f"no tokenizer in {folder}",
            wanted=" or ".join(TOKENIZER_FILES),
            remedy="write the model's tokenizer into the folder with save_pretrained",
        )


def _load_config(folder: Path) -> Any:
    """The model's config as transformers understands it: defaults filled in, other names (``n_positions``) mapped."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(
            "model.path",
            got=f"{folder / 'config.json'}: {error}",
            wanted="values that the model's class takes",
            remedy="give a folder that save_pretrained wrote",
        ) from error


def _check_head_size(model: Any) -> None:
    heads = getattr(model, "num_attention_heads", None)
    if getattr(model, "kv_lora_rank", None) or not isinstance(heads, int) or heads < 1:
        return  # compressed attention, or heads of their own in each layer: an engine says what it thinks of them
    size, sizes = getattr(model, "head_dim", None) or model.hidden_size // heads, vllm_source.cpu_head_sizes()
    if sizes and size not in sizes:
        raise ConfigError(
            "model.path",
            got=f"attention heads of size {size}",
            wanted=f"a size that vLLM's attention on CPU takes: {', '.join(map(str, sorted(sizes)))}",
            remedy="choose another model, or engines on GPUs (rollout.gpus_per_replica)",
        )


def _check_heads_divide(model: Any, shares: int) -> None:
    heads = getattr(model, "num_attention_heads", None)
    if isinstance(heads, int) and heads % shares:
        raise ConfigError(
            "rollout.vllm.tensor_parallel_size",
            got=f"{shares} shares of {heads} attention heads",
            wanted=f"a number that divides {heads}",
            remedy="give such a number, or leave it out",
        )


def _read_json(path: Path, wanted: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model.path",
            got=f"{path}: {type(error).__name__}: {error}",
            wanted=wanted,
            remedy="give a folder that save_pretrained wrote",
        ) from error
    return tree if isinstance(tree, dict) else {}
