"""Tiny random models of many architectures, each as a Hugging Face folder, with tokenizers of several manners.

Weights are spread widely, so that attention, norms and biases all show in the logits: a weight that does not arrive, or
a mask that is off, moves the log-probabilities by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

BOS, EOS, TURN_END, TURN_START = range(4)
SPECIAL_TOKENS = ("<s>", "</s>", "<turn_end>", "<turn>")
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
TOKENIZER_SIZE = len(SPECIAL_TOKENS) + len(BYTES)  # 260
VOCAB_SIZE = 288  # larger than the tokenizer's, as where a model's embedding is padded
MAX_POSITIONS = 128
WINDOW = 16  # of sliding attention: shorter than most sequences here

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<turn_end>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATE_WITH_BOS = "{{ bos_token }}" + CHAT_TEMPLATE


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyArchitecture:
    """A row of the table.

    Attributes:
        model_type: as transformers names it.
        config: what makes it different from ``COMMON``; None leaves a key to the class.
        chat_template: None means a model without one.
        adds_bos: whether the tokenizer puts a first token before every text.
        end_token: of the tokenizer; None means that it names none.
        generation_ends: ``eos_token_id`` of the generation config.
        zero_stage: of the learner that trains it.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    adds_bos: bool = False
    end_token: int | None = EOS
    generation_ends: int | list[int] = EOS
    zero_stage: int = 0

    @property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        named = [self.generation_ends] if isinstance(self.generation_ends, int) else self.generation_ends
        return {*named, *([] if self.end_token is None else [self.end_token])}


COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention on CPU takes
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.15,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,  # some classes have one beyond this vocabulary
}
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None}  # the heads share the width
TWO_FULL_HEADS = {**TWO_HEADS, "num_key_value_heads": None}  # a class without groups of heads
BOTH_ENDS = [EOS, TURN_END]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]

ARCHITECTURES = {
    "llama_untied": TinyArchitecture(model_type="llama", adds_bos=True),
    "llama_tied": TinyArchitecture(
        model_type="llama",
        config={"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        chat_template=CHAT_TEMPLATE_WITH_BOS,
        adds_bos=True,
        end_token=TURN_END,
        generation_ends=BOTH_ENDS,
        zero_stage=3,
    ),
    "qwen2_untied": TinyArchitecture(model_type="qwen2", config=TWO_HEADS, zero_stage=1),
    "qwen2_tied": TinyArchitecture(
        model_type="qwen2",
        config={**TWO_HEADS, "tie_word_embeddings": True},
        chat_template=CHAT_TEMPLATE,
        end_token=TURN_END,
        generation_ends=BOTH_ENDS,
        zero_stage=2,
    ),
    "qwen3_tied": TinyArchitecture(
        model_type="qwen3",
        config={"tie_word_embeddings": True},
        chat_template=CHAT_TEMPLATE,
        end_token=TURN_END,
        generation_ends=BOTH_ENDS,
        zero_stage=3,
    ),
    "mistral_sliding": TinyArchitecture(model_type="mistral", config={"sliding_window": WINDOW}, adds_bos=True),
    "gemma": TinyArchitecture(
        model_type="gemma",
        chat_template=CHAT_TEMPLATE_WITH_BOS,
        adds_bos=True,
        generation_ends=BOTH_ENDS,
        zero_stage=2,
    ),
    "gemma2": TinyArchitecture(
        model_type="gemma2",
        config={
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 2.0,  # low, so that it acts
            "final_logit_softcapping": 4.0,
            "layer_types": LAYER_TYPES,
        },
        adds_bos=True,
    ),
    "gemma3": TinyArchitecture(
        model_type="gemma3_text",
        config={"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "layer_types": LAYER_TYPES},
        chat_template=CHAT_TEMPLATE_WITH_BOS,
        adds_bos=True,
        generation_ends=BOTH_ENDS,
        zero_stage=3,
    ),
    "phi3_fused": TinyArchitecture(model_type="phi3", config=TWO_HEADS, end_token=None, generation_ends=BOTH_ENDS),
    "mixtral_experts": TinyArchitecture(
        model_type="mixtral", config={"num_local_experts": 4, "num_experts_per_tok": 2}, zero_stage=3
    ),
    "qwen3_experts": TinyArchitecture(
        model_type="qwen3_moe",
        config={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True},
        zero_stage=2,
    ),
    # vLLM runs the class of transformers; its files name the head otherwise than its modules
    "gpt_neox": TinyArchitecture(model_type="gpt_neox", config=TWO_FULL_HEADS, zero_stage=1),
    # learned positions, transposed weights
    "gpt2": TinyArchitecture(model_type="gpt2", config={**TWO_FULL_HEADS, "n_positions": MAX_POSITIONS}),
}


def make_folder(architecture: TinyArchitecture, folder: Path) -> None:
    """Write model, configs and tokenizer."""
    torch.manual_seed(0)
    left_out = {name for name, value in architecture.config.items() if value is None}
    settings = {name: value for name, value in {**COMMON, **architecture.config}.items() if name not in left_out}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at 0 or 1; here none is what another one could be
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=architecture.generation_ends, do_sample=True, top_k=20
    )
    model.save_pretrained(folder)
    make_tokenizer(architecture).save_pretrained(folder)


def make_tokenizer(architecture: TinyArchitecture) -> PreTrainedTokenizerFast:
    """One token a byte. It names no pad token."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *BYTES))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if architecture.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=None if architecture.end_token is None else SPECIAL_TOKENS[architecture.end_token],
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = architecture.chat_template
    return made
