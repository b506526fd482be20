"""`rlsys plan`: from a run that goes on, one that has ended, or given rates; and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlsys import cli
from rlsys.config.load import dump_config, load_config

# engines make 40 a second on 2 cores, the trainer trains 120 on 2
ROW = {
    "step": 7,
    "version": "0.7",
    "time_s": 3.5,
    "balance/rollouts_made_per_s": 40.0,
    "balance/engines": 2.0,
    "balance/rollouts_trained_per_s": 120.0,
    "balance/rollout_tokens_per_s": 400.0,
    "balance/trainer_tokens_per_s": 1100.0,
    "balance/rollouts_per_s": 30.0,
    "balance/trainer_idle": 0.7,
    "balance/rollout_idle": 0.1,
}


def invoke(*words: object):
    return CliRunner().invoke(cli.app, ["plan", *map(str, words)])


def figures_of(tmp_path: Path, *words: object) -> dict[str, float]:
    file = tmp_path / "plan.json"
    done = invoke(*words, "--json", file)
    assert done.exit_code == 0, done.output
    return json.loads(file.read_text())["figures"]


@pytest.fixture
def config(tmp_path) -> Path:
    """A config of 2 engines and 2 ranks, of a core each, and 80 rollouts a batch."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{name: mine, root: {tmp_path}}}\n"
        "rollout: {replicas: 2, group_size: 8}\n"
        "train: {ranks: 2, prompts_per_batch: 10}\n"
    )
    return path


@pytest.fixture
def run(tmp_path, config) -> Path:
    """Its run folder, after 7 steps."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config(config)))
    older = {**ROW, "step": 6, "balance/rollouts_made_per_s": 1.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (older, ROW)))
    return folder


@pytest.mark.parametrize("by", ["config", "run"])
def test_a_run_that_goes_on_is_planned_by_its_last_row(tmp_path, config, run, by):
    figures = figures_of(tmp_path, config if by == "config" else run)
    # a core makes 20 and trains 60: theta* = 20 / 80, so 1 of 4 cores trains 60 and 3 make 60; now it is 40
    assert figures["trainer_share"] == pytest.approx(0.25)
    assert figures["present/bottleneck"] == "rollout"
    assert figures["present/trainer_idle"] == pytest.approx(2 / 3)
    assert figures["present/step_s"] == pytest.approx(80 / 40)
    assert figures["balanced/step_s"] == pytest.approx(80 / 60)
    assert figures["speedup_over_present"] == pytest.approx(1.5)
    assert (figures["whole/trainer_cores"], figures["whole/rollout_cores"]) == (1, 3)
    # all 4 cores make 80 and then train 240 a second: 1 s + 1/3 s for a batch of 80
    assert figures["in_turns/step_s"] == pytest.approx(4 / 3)
    assert (figures["trainer/idle"], figures["rollout/idle"]) == (0.7, 0.1)
    assert figures["measured/share_of_expected"] == pytest.approx(30 / 40)
    assert figures["rollout/rollouts_per_s_of_a_part"] == 20.0


def test_the_terminal_is_told_the_bottleneck_the_share_and_what_is_gained(run):
    text = invoke(run).output
    assert "The engines are the bottleneck: the trainer is to wait 67% of the time." in text
    assert "theta* = 25.0% of the cores for the trainer: balanced, 1.50 times as fast as the present split." in text
    assert "In whole cores: 1 for the trainer, 3 for the engines, 1.50 times as fast" in text
    assert "The run did 30 rollouts/s, 75% of what is expected of its split." in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_run_that_has_ended_is_planned_by_the_whole_of_it(tmp_path, run):
    result = {
        "steps": 9,
        "balance/rollouts_made_per_s": 60.0,
        "balance/engines": 2.0,
        "balance/rollouts_trained_per_s": 60.0,
        "rollouts_per_s": 60.0,
        "idle/trainer": 0.0,
        "idle/rollout": 0.0,
    }
    (run / "result.json").write_text(json.dumps(result))
    figures = figures_of(tmp_path, run)
    assert figures["trainer_share"] == pytest.approx(0.5)
    assert figures["speedup_over_present"] == pytest.approx(1.0)
    assert "Both sides are equally fast" in invoke(run).output


def test_a_run_that_failed_before_it_trained_is_planned_by_its_last_row(tmp_path, run):
    (run / "result.json").write_text(json.dumps({"exit": 1, "failure": "no disk"}))
    assert figures_of(tmp_path, run)["trainer_share"] == pytest.approx(0.25)


def test_a_row_that_is_being_written_is_passed_over(tmp_path, run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "vers')
    assert figures_of(tmp_path, run)["trainer_share"] == pytest.approx(0.25)


def test_words_ask_about_another_split_of_the_same_rates(tmp_path, run):
    # 3 engines make 60, 1 rank trains 60: the balanced split itself
    figures = figures_of(tmp_path, run, "rollout.replicas=3", "train.ranks=1")
    assert figures["as_measured/rollouts_per_s"] == pytest.approx(40.0)
    assert figures["present/rollouts_per_s"] == pytest.approx(60.0)
    assert figures["speedup_over_present"] == pytest.approx(1.0)
    assert figures["measured/share_of_expected"] == pytest.approx(30 / 40)  # of the split that it ran with


def test_a_run_of_an_open_number_of_engines_is_planned_with_as_many_as_it_had(tmp_path, run, config):
    (run / "config.yaml").write_text(dump_config(load_config(config, ["rollout.replicas=auto"])))
    row = {**ROW, "balance/engines": 4.0, "balance/rollouts_made_per_s": 80.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    figures = figures_of(tmp_path, run)
    # 4 cores make 80, 2 train 120: the same rates of a core as with half of the engines
    assert (figures["present/rollout_cores"], figures["rollout/rollouts_per_s_of_a_part"]) == (4.0, 20.0)
    assert figures["trainer_share"] == pytest.approx(0.25)
    assert figures_of(tmp_path, run, "rollout.replicas=2")["present/rollouts_per_s"] == pytest.approx(40.0)


def test_an_open_number_of_engines_that_no_run_has_measured_is_refused(config):
    done = invoke(config, "rollout.replicas=auto", "--rollout-rate", 10, "--trainer-rate", 30)
    assert done.exit_code == 2 and "auto, and no run that measured how many engines that are" in done.output


def test_a_run_that_takes_turns_is_told_so(run):
    assert "the sides take turns" in invoke(run, "rollout.max_staleness=0").output
    assert "the sides take turns" not in invoke(run).output


def test_given_rates_need_no_run(tmp_path):
    figures = figures_of(tmp_path, "--rollout-rate", 10, "--trainer-rate", 30, "--cores", 8)
    assert figures["trainer_share"] == pytest.approx(0.25)
    assert figures["balanced/rollouts_per_s"] == pytest.approx(60.0)
    assert not any(name.startswith("present/") or name.endswith("step_s") for name in figures)


def test_given_rates_and_a_config_need_no_run_either(tmp_path, config):
    figures = figures_of(tmp_path, config, "--rollout-rate", 20, "--trainer-rate", 60)
    assert figures["speedup_over_present"] == pytest.approx(1.5)


def test_rates_that_grow_slower_than_their_cores_make_taking_turns_slower(tmp_path):
    words = ("--rollout-rate", 10, "--trainer-rate", 10, "--cores", 2)
    assert figures_of(tmp_path, *words)["speedup_over_in_turns"] == pytest.approx(1.0)
    # of 2 cores one each is balanced: 10; in turns each does 10 x 1.25 with both: 6.25
    slower = figures_of(tmp_path, *words, "--rollout-doubling", 1.25, "--trainer-doubling", 1.25)
    assert slower["speedup_over_in_turns"] == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "CONFIG|RUN_FOLDER"),
        (["--rollout-rate", "1", "--trainer-rate", "1"], "CONFIG|RUN_FOLDER"),
        (["--rollout-rate", "1", "--cores", "2"], "--trainer-rate"),
        (["--trainer-rate", "1", "--cores", "2"], "--rollout-rate"),
        (["--rollout-rate", "0", "--trainer-rate", "1", "--cores", "2"], "--rollout-rate"),
        (["--rollout-rate", "1", "--trainer-rate", "nan", "--cores", "2"], "--trainer-rate"),
        (["--rollout-rate", "1", "--trainer-rate", "1", "--cores", "-2"], "--cores"),
        (["--rollout-rate", "1", "--trainer-rate", "1", "--cores", "2", "--trainer-doubling", "3"], "--trainer-doub"),
        (["no_such.yaml"], "no_such.yaml"),
        (["{tmp}"], "a folder without config.yaml"),
        (["{config}"], "no run there"),
        (["{config}", "rollout.cpus_per_replica=0", "--rollout-rate", "1", "--trainer-rate", "1"], "cpus_per_replica"),
        (["{config}", "train.gpus_per_rank=1", "--rollout-rate", "1", "--trainer-rate", "1"], "gpus_per_replica"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(tmp_path, config, words, message):
    done = invoke(*(word.format(tmp=tmp_path, config=config) for word in words))
    assert done.exit_code == 2
    assert "config error" in done.output and message in done.output


def test_a_run_without_rates_is_refused(run):
    row = {"step": 1, "version": "0.1", "time_s": 1.0, "balance/rollouts_made_per_s": None}
    for content in ("", json.dumps(row) + "\n"):
        (run / "metrics.jsonl").write_text(content)
        done = invoke(run)
        assert done.exit_code == 2 and "no rates of both sides" in done.output


def test_rates_of_cores_say_nothing_of_gpus(run):
    done = invoke(run, "rollout.gpus_per_replica=1", "train.gpus_per_rank=1")
    assert done.exit_code == 2 and "measured its rates on cores" in done.output


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(run):
    done = invoke(run, "--json", run / "none" / "plan.json")
    assert done.exit_code == 2 and "--json" in done.output
