"""Writing a model as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

TIED_HEAD = "lm_head.weight"  # the embedding itself: not written a second time


def write_folder(
    out: Path,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write the weights of ``model``, its head tied, with the rest beside them. By hand rather than by its
    ``save_pretrained``, which shows a progress bar and imports DeepSpeed."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != TIED_HEAD}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    generation.save_pretrained(out)
    tokenizer.save_pretrained(out)
