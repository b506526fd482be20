"""The learner of a checkpoint, looked at before an actor starts."""

import json
from pathlib import Path

import pytest

from rlsys.actors.checkpoint import Start
from rlsys.actors.inputs import Inputs
from rlsys.actors.other_layout import check_learner, in_layout, remove_converted
from rlsys.config.load import apply_overrides
from rlsys.config.schema import Config, RunSection
from rlsys.controller.state import RunState
from rlsys.errors import ConfigError
from rlsys.sim.fleet import sim_source

NUMBERS = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 128}


def write(folder: Path, vocab_size: int = 128) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**NUMBERS, "vocab_size": vocab_size}))
    return folder


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(run=RunSection(name="resumed", root=tmp_path))


@pytest.fixture
def start(tmp_path) -> Start:
    """Saved without ZeRO, with a critic."""
    learner = tmp_path / "checkpoints" / "step_4" / "learner"
    for folder in (learner, learner / "critic"):
        folder.mkdir(parents=True)
        (folder / "layout.json").write_text(json.dumps({"ranks": 1, "tensor_parallel": 1, "zero_stage": 0}))
        (folder / "model.json").write_text(json.dumps(NUMBERS))
    return Start(state=RunState(), learner=str(learner))


def inputs(model: Path, critic: Path | None = None) -> Inputs:
    return Inputs(
        model_path=str(model),
        longest_prompt=8,
        pad_token_id=0,
        reward_path="",
        source=sim_source(num_train=2, num_eval=1, seed=0),
        critic_path=None if critic is None else str(critic),
    )


def test_the_same_layout_is_read_as_it_is(config, start, tmp_path):
    check_learner(config, inputs(write(tmp_path / "model")), start)
    told: list[str] = []
    assert in_layout(config, start, told.append) is start and told == []
    remove_converted(start)
    assert Path(str(start.learner)).is_dir(), "a checkpoint is not removed"


def test_a_run_without_a_checkpoint_has_nothing_to_check(config, tmp_path):
    fresh = Start(state=RunState())
    check_learner(config, inputs(tmp_path / "nowhere"), fresh)
    assert in_layout(apply_overrides(config, ["train.zero_stage=3"]), fresh, print) is fresh


def test_another_model_or_critic_than_that_of_the_checkpoint_is_refused(config, start, tmp_path):
    model, other = write(tmp_path / "model"), write(tmp_path / "other", vocab_size=130)
    with pytest.raises(ConfigError) as caught:
        check_learner(config, inputs(other), start)
    assert caught.value.what == "model.path" and "vocab_size=130" in caught.value.got
    assert "vocab_size=128" in caught.value.wanted
    with pytest.raises(ConfigError) as caught:
        check_learner(config, inputs(model, critic=other), start)
    assert caught.value.what == "critic.path"


def test_a_layout_that_it_cannot_be_brought_into_is_refused(config, start, tmp_path):
    asked = apply_overrides(config, ["train.zero_stage=1", "train.dtype=bfloat16"])
    with pytest.raises(ConfigError) as caught:
        check_learner(asked, inputs(write(tmp_path / "model")), start)
    assert caught.value.what == "train.zero_stage=1" and caught.value.remedy == "resume with train.zero_stage=0"
    moving = apply_overrides(config, ["train.tensor_parallel=2", "algo.reference_every_steps=3"])
    with pytest.raises(ConfigError, match="algo.reference_every_steps"):
        check_learner(moving, inputs(tmp_path / "model"), start)
