"""A model's folder is looked through before an actor starts: what learner or engines cannot hold is refused."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlsys.config.load import apply_overrides
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.model_folder import ModelFacts, check_model_folder, check_vocabulary, load_tokenizer

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}


def config_of(*overrides: str) -> Config:
    return apply_overrides(Config(), list(overrides))


def refused(check, config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check(config)
    error = caught.value
    assert error.what == "model.path" and all((error.got, error.wanted, error.remedy)), str(error)
    return error


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model's, and the config that names it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").touch()
    return config_of(f"model.path={folder}"), folder


def write_config(folder, **keys: object) -> None:
    """``LLAMA`` with other values; None removes a key."""
    tree = {name: value for name, value in {**LLAMA, **keys}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(tree))


def test_a_model_folder_gives_context_and_vocabulary(model):
    config, _ = model
    assert check_model_folder(config) == ModelFacts(max_positions=128, vocab_size=300)


def test_the_embedded_model_is_known_without_its_folder():
    assert check_model_folder(config_of("model.path=tiny")) == ModelFacts(max_positions=2048, vocab_size=128)


@pytest.mark.parametrize(
    ("config_json", "max_positions"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 96}, 96),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, 2048),  # left out: the class's own
    ],
)
def test_the_context_is_found_under_its_other_name_and_where_it_is_left_out(model, config_json, max_positions):
    config, folder = model
    (folder / "config.json").write_text(json.dumps(config_json))
    assert check_model_folder(config).max_positions == max_positions


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("gpt_neox", "GPTNeoXForCausalLM"),
        ("ministral", "MinistralForCausalLM"),  # vLLM has none of its own and takes the class of transformers
    ],
)
def test_usual_architectures_pass(model, model_type, architecture):
    config, folder = model
    write_config(folder, model_type=model_type, architectures=[architecture], head_dim=32)
    check_model_folder(config)


@pytest.mark.parametrize(
    ("missing", "got"),
    [("config.json", "config.json"), ("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")],
)
def test_a_model_folder_without_a_part_is_refused(model, missing, got):
    config, folder = model
    (folder / missing).unlink()
    assert got in refused(check_model_folder, config).got


def test_a_tokenizer_config_alone_is_no_tokenizer(model):
    config, folder = model
    (folder / "tokenizer.json").rename(folder / "tokenizer_config.json")
    assert "no tokenizer" in refused(check_model_folder, config).got


def test_a_missing_model_folder_is_refused(tmp_path):
    assert "is no folder" in refused(check_model_folder, config_of(f"model.path={tmp_path}/none")).got


@pytest.mark.parametrize(
    ("text", "got"), [("{", "JSONDecodeError"), ('{"model_type": "lama"}', "'lama'"), ("[]", "None")]
)
def test_a_model_of_no_known_kind_is_refused(model, text, got):
    config, folder = model
    (folder / "config.json").write_text(text)
    assert got in refused(check_model_folder, config).got


def test_a_value_that_the_models_class_does_not_take_is_refused(model):
    config, folder = model
    write_config(folder, num_hidden_layers="many")
    assert "num_hidden_layers" in refused(check_model_folder, config).got


def test_an_encoder_decoder_is_refused(model):
    config, folder = model
    write_config(folder, model_type="bart", architectures=["BartForConditionalGeneration"], is_encoder_decoder=True)
    assert "encoder-decoder" in refused(check_model_folder, config).got


def test_a_model_that_does_not_name_its_class_is_refused_with_the_name_to_write(model):
    config, folder = model
    write_config(folder, architectures=None)
    error = refused(check_model_folder, config)
    assert "no architectures" in error.got and '["LlamaForCausalLM"]' in error.remedy


@pytest.mark.parametrize(
    ("model_type", "architecture", "remedy"),
    [
        ("llama", "LlamaForSequenceClassification", "did you mean"),
        ("llama", "LamaForCausalLM", "did you mean LlamaForCausalLM?"),
        ("gemma3", "Gemma3ForConditionalGeneration", ""),  # text and images: the learner trains text alone
        ("stablelm", "StableLMEpochForCausalLM", "did you mean StableLmForCausalLM?"),  # a name that vLLM gave up
        ("biogpt", "BioGptForCausalLM", ""),  # vLLM has none, and that of transformers keeps its attention
    ],
)
def test_an_architecture_that_vllm_does_not_serve_as_a_text_model_is_refused(model, model_type, architecture, remedy):
    config, folder = model
    write_config(folder, model_type=model_type, architectures=[architecture])
    error = refused(check_model_folder, config)
    assert repr(architecture) in error.got and "vLLM" in error.wanted and remedy in error.remedy


@pytest.mark.parametrize(
    ("model_type", "architecture", "got"),
    [
        ("lfm2", "Lfm2ForCausalLM", "carries a state from token to token (conv)"),
        ("mamba", "MambaForCausalLM", "carries a state"),
        ("jamba", "JambaForCausalLM", "carries a state"),
        ("gptj", "GPTJForCausalLM", "whose attention is its own"),
        ("bloom", "BloomForCausalLM", "whose attention is its own"),
    ],
)
def test_an_architecture_that_the_learner_cannot_train_is_refused(model, model_type, architecture, got):
    config, folder = model
    kinds = ["conv", "full_attention"] if model_type == "lfm2" else None
    write_config(folder, model_type=model_type, architectures=[architecture], layer_types=kinds, num_hidden_layers=2)
    error = refused(check_model_folder, config)
    assert architecture in error.got and got in error.got


def test_quantised_weights_are_refused(model):
    config, folder = model
    write_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in refused(check_model_folder, config).got


def test_an_index_that_lists_files_which_are_not_there_is_refused(model):
    config, folder = model
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-1.safetensors").touch()
    assert "1 of its 2 files missing: model-2.safetensors" in refused(check_model_folder, config).got
    (folder / "model-2.safetensors").touch()
    check_model_folder(config)


@pytest.mark.parametrize("sizes", [{"hidden_size": 64, "num_attention_heads": 4}, {"head_dim": 16}])
def test_heads_for_which_the_engine_has_no_code_on_cpu_are_refused(model, sizes):
    config, folder = model
    write_config(folder, **sizes)
    error = refused(check_model_folder, config)
    assert "size 16" in error.got and "32, 64, 80" in error.wanted
    check_model_folder(apply_overrides(config, ["rollout.gpus_per_replica=1"]))


def test_heads_that_tensor_parallel_shares_do_not_divide_are_refused(model):
    config, folder = model
    write_config(folder, hidden_size=192, num_attention_heads=6)
    check_model_folder(apply_overrides(config, ["rollout.vllm.tensor_parallel_size=3"]))
    with pytest.raises(ConfigError) as caught:
        check_model_folder(apply_overrides(config, ["rollout.vllm.tensor_parallel_size=4"]))
    assert caught.value.what == "rollout.vllm.tensor_parallel_size" and "6 attention heads" in caught.value.got


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_tokenizer_that_does_not_load_is_refused(model, text):
    config, folder = model
    (folder / "tokenizer.json").write_text(text)
    assert "does not load" in refused(load_tokenizer, config).got


def test_a_token_without_a_row_in_the_embedding_is_refused():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    )
    check_vocabulary(tokenizer, ModelFacts(max_positions=None, vocab_size=3))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # without a row for it: what fine-tuned models often come with
    with pytest.raises(ConfigError) as caught:
        check_vocabulary(tokenizer, ModelFacts(max_positions=None, vocab_size=3))
    assert "tokens up to 3" in caught.value.got and "tokens up to 2" in caught.value.wanted
