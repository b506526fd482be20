"""The pretrained model as it is made from its package: complete, plain, and the same to transformers and to vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlsys.models.smollm2 import make_smollm2
from rlsys.rollout.play import opening_tokens

pytestmark = pytest.mark.engines

QUESTIONS = ("What is the capital of France?", "Name three colors.", "Why is the sky blue?")
NUM_TOKENS = 16
PLAIN_VLLM = Path(__file__).with_name("plain_vllm_greedy.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    make_smollm2(folder)
    return folder


@pytest.fixture(scope="module")
def answers(folder) -> list[list[int]]:
    """Greedy answers of transformers, token ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for question in QUESTIONS:
        prompt = torch.tensor([opening_tokens(tokenizer, question)])
        sampled = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        answers.append(sampled[0, prompt.shape[1] :].tolist())
    return answers


def test_the_folder_is_plain_safetensors_with_a_fresh_config(folder):
    assert sorted(file.name for file in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "gguf" not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"] and config.tie_word_embeddings
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (49152, 576, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) == (9, 3, 8192)
    assert config.rope_parameters["rope_theta"] == 100_000.0 and config.rms_norm_eps == 1e-5
    for ids in (config, GenerationConfig.from_pretrained(folder)):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 2)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (it is no mapping)
    assert "lm_head.weight" not in slices and {part.get_dtype() for part in slices.values()} == {"F32"}
    assert sum(torch.Size(part.get_shape()).numel() for part in slices.values()) == 134_515_008


def test_digits_are_split_off_before_everything_else(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("2+34\n\n5")["input_ids"]) == ["2", "+", "3", "4", "ĊĊ", "5"]
    text = "Hello  world\n\n 3.14, naïve"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_model_answers_in_english_and_ends_its_turn(folder, answers):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(answers[0]) == "The capital of France is Paris.<|im_end|>"


def test_greedy_answers_of_vllm_are_those_of_transformers(folder, answers):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [opening_tokens(tokenizer, question) for question in QUESTIONS]
    done = subprocess.run(
        [sys.executable, str(PLAIN_VLLM), str(folder), json.dumps(prompts), str(NUM_TOKENS)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == answers
