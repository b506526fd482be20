"""What a resumed run's learner may change is decided before anything starts."""

import json
from pathlib import Path

import pytest

from rlsys.config.schema import TrainSection
from rlsys.errors import CheckpointDamaged, ConfigError
from rlsys.train.checkpoint import Layout, is_readable, rank_before
from rlsys.train.resume import check_layout, check_model

CONFIG = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 128, "hidden_size": 64, "eos_token_id": 3, "tie": True}


def write_config(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@pytest.fixture
def learner(tmp_path) -> Path:
    """Saved under tensor parallel 2, ZeRO 2."""
    folder = tmp_path / "learner"
    folder.mkdir()
    (folder / "layout.json").write_text(json.dumps({"ranks": 2, "tensor_parallel": 2, "zero_stage": 2}))
    numbers = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 128, "hidden_size": 64}
    (folder / "model.json").write_text(json.dumps(numbers))
    return folder


def train(**keys) -> TrainSection:
    return TrainSection.model_validate({"ranks": 2, "tensor_parallel": 2, "zero_stage": 2, **keys})


def test_the_model_of_the_run_is_taken(learner, tmp_path):
    check_model(learner, write_config(tmp_path / "model", eos_token_id=5), "model.path")


@pytest.mark.parametrize("changes", [{"vocab_size": 130}, {"architectures": ["LlamaForCausalLM"]}, {"head_dim": 32}])
def test_a_model_of_another_shape_is_refused_by_what_differs(learner, tmp_path, changes):
    ((key, value),) = changes.items()
    with pytest.raises(ConfigError) as caught:
        check_model(learner, write_config(tmp_path / "model", **changes), "model.path")
    assert caught.value.what == "model.path" and f"{key}={value}" in caught.value.got
    assert f"{key}=" in caught.value.wanted and "put back the model" in caught.value.remedy


def test_the_numbers_of_a_text_model_inside_another_one_count(learner, tmp_path):
    inner = {key: CONFIG[key] for key in ("vocab_size", "hidden_size")}
    check_model(
        learner, write_config(tmp_path / "model", vocab_size="", hidden_size="", text_config=inner), "model.path"
    )


def test_a_learner_that_does_not_say_of_what_model_it_is_counts_as_damaged(learner, tmp_path):
    (learner / "model.json").unlink()
    with pytest.raises(CheckpointDamaged, match="model.json"):
        check_model(learner, write_config(tmp_path / "model"), "model.path")


@pytest.mark.parametrize(
    "keys", [{"ranks": 1}, {"tensor_parallel": 1}, {"zero_stage": 3}, {"zero_stage": 0, "ranks": 4}]
)
def test_other_layouts_are_taken(learner, keys):
    check_layout(learner, train(**keys), moves_reference=False)


@pytest.mark.parametrize(
    ("keys", "moves_reference", "reason"),
    [
        ({"optimizer": {"name": "sgd"}}, False, "sgd"),
        ({"zero_stage": 0, "dtype": "bfloat16"}, False, "bfloat16"),
        ({"zero_stage": 1, "offload": "optimizer"}, False, "offloaded"),
        ({"tensor_parallel": 1}, True, "algo.reference_every_steps"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_layout_that_can_be_read(learner, keys, moves_reference, reason):
    with pytest.raises(ConfigError) as caught:
        check_layout(learner, train(ranks=1, **keys), moves_reference=moves_reference)
    assert "train.ranks=1" in caught.value.what and reason in caught.value.got
    assert caught.value.remedy.startswith("resume with train.ranks=2")


def test_the_same_layout_is_read_whatever_the_optimizer(learner):
    check_layout(learner, train(optimizer={"name": "sgd"}), moves_reference=True)


def test_without_zero_the_number_of_ranks_is_free():
    def layout(ranks, zero_stage, tensor_parallel=1):
        return Layout(ranks=ranks, zero_stage=zero_stage, tensor_parallel=tensor_parallel)

    assert is_readable(layout(2, 0), layout(1, 0)) and is_readable(layout(1, 2), layout(1, 2))
    assert not is_readable(layout(2, 0), layout(2, 1)) and not is_readable(layout(2, 1), layout(1, 1))
    assert not is_readable(layout(1, 0, 2), layout(1, 0, 1))


def test_every_process_has_one_before_it():
    two_by_two = Layout(ranks=2, zero_stage=1, tensor_parallel=2)
    assert [rank_before(rank, two_by_two, two_by_two) for rank in range(4)] == [0, 1, 2, 3]
    single = Layout(ranks=1, zero_stage=1)
    assert [rank_before(rank, two_by_two, single) for rank in range(4)] == [0, 0, 0, 0]
    four = Layout(ranks=4, zero_stage=1)
    assert [rank_before(rank, four, two_by_two) for rank in range(4)] == [0, 2, 0, 2]
