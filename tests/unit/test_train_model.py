"""Loading and naming of models: packed samples stay apart, every part of the model acts, files keep their names."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlsys.errors import ConfigError
from rlsys.train.export import FullWeights
from rlsys.train.model import load_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
TOKENS = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, model_type: str, **settings: object) -> str:
    """A random model in a folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("mistral", {"sliding_window": 4}), ("mixtral", {}), ("gpt2", {"num_key_value_heads": None})],
)
def test_a_model_whose_samples_stay_apart_in_a_row_is_loaded(tmp_path, model_type, settings):
    assert load_model(saved(tmp_path, model_type, **settings)).training


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("opt", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]})],  # masks without positions; a convolution
)
def test_a_model_whose_samples_see_one_another_in_a_row_is_refused(tmp_path, model_type, settings):
    with pytest.raises(ConfigError, match="a sample sees the one before it in its row"):
        load_model(saved(tmp_path, model_type, **settings))


def test_a_cap_on_attention_scores_acts_in_the_learner_too(tmp_path):
    path = saved(tmp_path, "gemma2", attn_logit_softcapping=1.0, query_pre_attn_scalar=1, sliding_window=8)
    eager, sdpa = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
        for attention in ("eager", "sdpa")
    )
    torch.testing.assert_close(logits(load_model(path)), logits(eager))
    assert (logits(sdpa) - logits(eager)).abs().max() > 0.1  # what it would be without the cap


def test_no_dropout_is_left_in_training(tmp_path):
    model = load_model(saved(tmp_path, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_neox"])
def test_weights_leave_the_learner_under_the_names_and_shapes_of_the_models_files(tmp_path, model_type):
    path = saved(tmp_path, model_type)
    with safe_open(Path(path) / "model.safetensors", "pt") as file:
        wanted = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    unused = ModuleType("unused below stage 3")
    got = {
        name: tensor
        for bucket in FullWeights(load_model(path), deepspeed=unused, zero_stage=0)
        for name, tensor in bucket.items()
    }
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, wanted[name].float()), name
