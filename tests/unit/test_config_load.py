"""Every kind of wrong input to the loader, and what comes of right input."""

from typing import get_args

import pytest

from rlsys.config.load import apply_overrides, config_keys, dump_config, load_config, nearest_key
from rlsys.config.presets import PRESETS, resolve
from rlsys.config.schema import AlgoSection, Config, Preset, Row
from rlsys.errors import ConfigError

NAMED_ALONE = {"kl", "kl_control", "entropy_control"}  # rows that no preset sets
YAML = """\
run:
  name: first
  steps: 3
train:
  lr: 1e-5
  betas: [0.9, 0.95]
algo:
  loss: {name: ppo_clip, eps_high: 3e-1}
rollout:
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config file into an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str = YAML):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_file


def refused(path, *overrides) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    error = caught.value
    assert all((error.what, error.got, error.wanted, error.remedy)), str(error)
    return error


def test_values_come_from_the_file_then_from_the_command_line(write):
    config = load_config(write(), ["rollout.max_staleness=0", "algo.loss.eps_low=0.1", "run.name=second"])
    assert (config.run.name, config.run.steps) == ("second", 3)
    assert config.train.lr == 1e-5 and config.train.betas == (0.9, 0.95)
    assert config.rollout.max_staleness == 0
    assert config.algo.loss is not None and config.algo.loss.params == {"eps_high": 0.3, "eps_low": 0.1}


def test_an_override_may_give_a_whole_row_or_mapping(write):
    config = load_config(write(), ["algo.correction={name: none}", "rollout.vllm.block_size=16", "data.task={name: a}"])
    assert config.algo.correction == Row(name="none")
    assert config.rollout.vllm == {"block_size": 16}


def test_a_dumped_config_loads_as_the_same_config(write):
    config = resolve(load_config(write(), ["eval.pass_at=[1, 8]", "train.deepspeed={zero_optimization: {a: 1e6}}"]))
    assert load_config(write(dump_config(config))) == config


def test_defaults_pass_their_own_validation():
    assert Config.model_validate_json(Config().model_dump_json(), strict=True) == Config()


def test_paths_are_taken_from_the_working_folder_and_made_absolute(write, tmp_path):
    path = write("data: {train_path: q.jsonl}\nmodel: {path: models/m}\nreward: {path: 'mine.py:reward'}\n")
    config = load_config(path)
    assert config.run.root == tmp_path / "runs"
    assert config.data.train_path == tmp_path / "q.jsonl" and config.data.eval_path is None
    assert config.model.path == str(tmp_path / "models/m")
    assert config.reward.path == f"{tmp_path}/mine.py:reward"


def test_names_that_are_no_paths_stay(write):
    config = load_config(write(), ["reward.path=package.module:reward", "run.root=/elsewhere/runs"])
    assert (config.model.path, config.reward.path, str(config.run.root)) == (
        "tiny",
        "package.module:reward",
        "/elsewhere/runs",
    )


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("rollout.max_stalness", "rollout.max_staleness"),  # a slip
        ("train.steps", "run.steps"),  # the right name in the wrong section
        ("lr", "train.lr"),  # no section
        ("rollouts.replicas", "rollout"),  # a slip in the section
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_key(write, key, meant):
    error = refused(write(), f"{key}=3")
    assert error.what == key.split(".")[0] if meant == "rollout" else error.what == key
    assert error.remedy == f"did you mean {meant}?"
    assert f"command line, {key}=3" in error.got or meant == "rollout"


def test_an_unknown_key_in_the_file_is_refused_with_file_and_line(write):
    error = refused(write("run:\n  name: a\n  stepz: 3\n"))
    assert error.what == "run.stepz" and error.remedy == "did you mean run.steps?"
    assert "config.yaml, line 3" in error.got


def test_a_key_like_nothing_gets_the_list_of_keys_and_no_guess():
    assert nearest_key("run.zzzzqqq", ["run.name"]) is None


@pytest.mark.parametrize(
    ("override", "what", "wanted"),
    [
        ("run.steps='3'", "run.steps", "integer"),
        ("run.steps=true", "run.steps", "integer"),
        ("run.steps=2.5", "run.steps", "integer"),
        ("run.steps=0", "run.steps", "greater than or equal to 1"),
        ("run.name=a b", "run.name", "letters"),
        ("run.name=..", "run.name", "letters"),
        ("train.lr=-1", "train.lr", "greater than 0"),
        ("train.lr=.nan", "train.lr", "finite"),
        ("train.lr=1e999", "train.lr", "finite"),
        ("train.zero_stage=7", "train.zero_stage", "0, 1, 2 or 3"),
        ("train.betas=[0.9]", "train.betas.1", "value"),
        ("train.betas=[0.9, 1.5]", "train.betas.1", "less than 1"),
        ("algo.preset=ppoo", "algo.preset", "grpo"),
        ("rollout.age_policy=forget", "rollout.age_policy", "drop"),
        ("rollout.vllm=3", "rollout.vllm", "mapping"),
        ("rollout=3", "rollout", "mapping"),
        ("observe.tensorboard=1", "observe.tensorboard", "boolean"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_refused(write, override, what, wanted):
    error = refused(write(), override)
    assert error.what == what and wanted in error.wanted
    assert override in error.got


def test_a_wrong_value_in_the_file_is_refused_with_its_line_and_the_other_wrong_keys(write):
    error = refused(write("run:\n  steps: many\ntrain:\n  ranks: 0\n"))
    assert error.what == "run.steps" and "config.yaml, line 2" in error.got
    assert "Also wrong: train.ranks" in error.remedy and "Default: 20" in error.remedy


def test_a_row_written_as_its_bare_name_is_shown_in_full(write):
    assert "{name: ppo_clip}" in refused(write(), "algo.loss=ppo_clip").remedy


def test_a_row_without_its_name_is_refused(write):
    error = refused(write(), "algo.correction.cap=3")
    assert error.what == "algo.correction.name" and "name" in error.remedy


def test_a_missing_file_is_refused(tmp_path):
    error = refused(tmp_path / "none.yaml")
    assert "none.yaml" in error.what and "No such file" in error.got


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    assert "directory" in refused(tmp_path).got


@pytest.mark.parametrize(
    ("text", "line"),
    [("run:\n  name: [a\n", 3), ("run: {name: a}\ntrain\n", 3), ("run:\n\tname: a\n", 2), ("run:\n  name: a: b\n", 2)],
)
def test_broken_yaml_is_refused_with_its_line(write, text, line):
    error = refused(write(text))
    assert f"line {line}" in error.what


def test_a_key_written_twice_is_refused(write):
    error = refused(write("run:\n  steps: 1\n  steps: 2\n"))
    assert "line 3" in error.what and "'steps' is written twice" in error.got


def test_a_list_in_place_of_sections_is_refused(write):
    assert "list" in refused(write("- run\n")).got


def test_an_empty_file_and_an_empty_section_mean_defaults(write):
    assert load_config(write("")) == load_config(write("run:\n"))


@pytest.mark.parametrize("word", ["run.steps", "=3", "run..steps=3", ".steps=3"])
def test_an_override_without_key_or_value_is_refused(write, word):
    assert word in refused(write(), word).what


def test_an_override_that_is_no_yaml_is_refused(write):
    assert "run.name=[" in refused(write(), "run.name=[").what


def test_an_override_below_a_plain_value_is_refused(write):
    assert "run.name is 'first'" in refused(write(), "run.name.x=3").got


def test_overrides_apply_to_a_config_made_in_code():
    assert apply_overrides(Config(), ["run.steps=7"]).run.steps == 7
    with pytest.raises(ConfigError, match="run.stepz"):
        apply_overrides(Config(), ["run.stepz=7"])


def test_a_preset_fills_the_rows_left_open_and_no_other():
    explicit = Row.model_validate({"name": "tis", "cap": 5.0})
    algo = resolve(Config(algo=AlgoSection(correction=explicit))).algo
    assert (algo.advantage, algo.loss, algo.correction) == (Row(name="grpo"), Row(name="ppo_clip"), explicit)


def test_every_preset_of_the_schema_names_every_row():
    rows = {key.rpartition(".")[2] for key, field in config_keys() if key.startswith("algo.") and "Row" in str(field)}
    by_presets = {"advantage", "loss", "correction", "rejections", "aggregation", "shaping", "selection"}
    assert rows == by_presets | NAMED_ALONE
    assert all(set(preset) == (rows - NAMED_ALONE) | {"anchor", "steps_per_batch"} for preset in PRESETS.values())
    assert set(get_args(Preset)) == set(PRESETS)
