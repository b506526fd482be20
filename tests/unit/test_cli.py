"""Exit statuses and messages of the command line, and how fast it answers."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import rlsys
from rlsys import cli
from rlsys.errors import ConfigError, Diverged

MAX_HELP_S = 1.0


def invoke(*words: str):
    return CliRunner().invoke(cli.app, list(words))


@pytest.fixture
def run_raising(monkeypatch):
    """Make a run end by raising."""

    def make(error: BaseException):
        def run(config, overrides, *, resume=False):
            raise error

        monkeypatch.setattr(rlsys, "run", run)

    return make


def test_help_answers_in_under_a_second_without_heavy_imports():
    command = [sys.executable, "-X", "importtime", "-m", "rlsys", "--help"]
    seconds = []
    for _ in range(3):  # the fastest of three: the machine may be busy
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        seconds.append(time.monotonic() - started)
    assert "train" in done.stdout and "check" in done.stdout and "make-model" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported & {"torch", "ray", "vllm", "deepspeed", "transformers", "numpy"} == set()
    assert min(seconds) < MAX_HELP_S


def test_version_is_the_packages():
    assert invoke("--version").stdout.strip() == rlsys.__version__


@pytest.mark.parametrize("status", [0, 1, 130])
def test_train_exits_as_the_run_ended_and_hands_on_path_and_overrides(monkeypatch, status):
    seen = []

    def run(config, overrides, *, resume=False):
        seen.append((config, overrides, resume))
        return SimpleNamespace(exit=status)

    monkeypatch.setattr(rlsys, "run", run)
    result = invoke("train", "a.yaml", "run.steps=3", "rollout.vllm={block_size: 16}")
    assert result.exit_code == status
    assert seen == [(Path("a.yaml"), ["run.steps=3", "rollout.vllm={block_size: 16}"], False)]
    assert invoke("train", "a.yaml", "--resume").exit_code == status
    assert seen[1] == (Path("a.yaml"), [], True)


def test_a_config_error_exits_2_with_what_got_wanted_remedy_and_no_traceback(run_raising):
    run_raising(ConfigError("data.train_path", got="nothing", wanted="a file", remedy="write one"))
    result = invoke("train", "a.yaml")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines() == [
        "config error: data.train_path",
        "  got:    nothing",
        "  wanted: a file",
        "  remedy: write one",
    ]


def test_a_failed_run_exits_1_and_says_why(run_raising):
    run_raising(Diverged("actor/pg_loss", 7, "0.6"))
    result = invoke("train", "a.yaml")
    assert result.exit_code == 1
    assert "Diverged: actor/pg_loss is not finite at step 7" in result.stderr and "Traceback" not in result.stderr


def test_an_unforeseen_error_exits_1_with_its_traceback(tmp_path):
    code = "import rlsys, rlsys.cli as c\ndef run(*a, **k): raise ZeroDivisionError\nrlsys.run = run; c.main()"
    done = subprocess.run([sys.executable, "-c", code, "train", "a.yaml"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_an_interrupted_run_exits_130(run_raising):
    run_raising(KeyboardInterrupt())
    assert invoke("train", "a.yaml").exit_code == 130


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.max_stalness=1", "did you mean rollout.max_staleness?"),
        ("model.path=no/such/model", "is no folder"),
        ("data={train_path: none.jsonl}", "none.jsonl"),
        ("reward.path=none.py:reward", "none.py"),
        ("algo.correction={name: none}", "a correction for tokens that an older policy sampled"),
    ],
)
def test_what_cannot_work_exits_2_before_anything_starts(tmp_path, monkeypatch, command, override, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "rlsys.actors.run", None)  # importing it, as starting needs, would raise
    Path("a.yaml").write_text("data: {task: {name: reversed_sum, digits: 1}, eval_questions: 10}\n")
    result = invoke(command, "a.yaml", override)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert [word in result.stderr for word in ("got:", "wanted:", "remedy:", "Traceback")] == [True, True, True, False]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.yaml"]


def test_check_prints_the_resolved_tree_and_what_follows_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("data: {task: {name: reversed_sum, digits: 1}, eval_questions: 10}\n")
    result = invoke("check", "a.yaml", "run.name=mine", "train.steps_per_batch=1")
    assert result.exit_code == 0, result.output
    assert "name: mine" in result.stdout and "name: ppo_clip" in result.stdout
    assert f"- run folder: {tmp_path}/runs/mine" in result.stdout
    assert "the loss's trust region never acts" in result.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "a.yaml"]


def test_make_model_writes_into_no_folder_that_holds_something(tmp_path):
    (tmp_path / "file").touch()
    result = invoke("make-model", "tiny", str(tmp_path))
    assert result.exit_code == 2 and "new or empty folder" in result.stderr


def test_make_model_hands_on_folder_and_seed(tmp_path, monkeypatch):
    made = []
    tiny = SimpleNamespace(make_tiny=lambda out, *, seed: made.append((out, seed)))
    monkeypatch.setitem(sys.modules, "rlsys.models.tiny", tiny)
    result = invoke("make-model", "tiny", str(tmp_path / "out"), "--seed", "3")
    assert result.exit_code == 0, result.output
    assert made == [(tmp_path / "out", 3)]


def test_a_kind_of_model_that_does_not_exist_is_a_usage_error(tmp_path):
    assert invoke("make-model", "huge", str(tmp_path / "out")).exit_code == 2


def test_train_can_be_called_although_it_is_a_package_too(monkeypatch):
    import rlsys.train.deepspeed_config  # importing the package's parts must not take the call away

    seen = []
    monkeypatch.setattr(rlsys, "run", lambda config, overrides, *, resume: seen.append((config, overrides, resume)))
    rlsys.train("a.yaml", ["run.steps=3"], resume=True)
    assert seen == [("a.yaml", ["run.steps=3"], True)]
    assert rlsys.train.deepspeed_config.deepspeed_config is not None
