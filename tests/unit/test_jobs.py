"""Decisions about Ray jobs: exit status, retries, addresses, the job's command, and a log shown whole and once."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from rlsys import cli
from rlsys.actors import jobs
from rlsys.actors.cluster import ray_cluster
from rlsys.config.load import load_config
from rlsys.config.presets import resolve
from rlsys.config.schema import Config, RaySection, RunSection, TrainSection
from rlsys.errors import ConfigError, RlsysError

ADDRESS = "http://head:8265"


class ScriptedApi:
    """A cluster whose jobs end as told, one after another. The connection to a log is cut off the first time."""

    log = "one\ntwo\nthree\n"

    def __init__(self, *ends: tuple[JobStatus, int | None]):
        self.sent: list[dict[str, object]] = []
        self.configs: list[Config] = []
        self._ends, self._looks, self._follows = list(ends), 0, 0

    def get_address(self) -> str:
        return ADDRESS

    def submit_job(self, **request) -> str:
        self.sent.append(request)
        self.configs.append(load_config(Path(request["runtime_env"]["working_dir"]) / "config.yaml"))
        self._looks = 0
        return request["submission_id"]

    def get_job_info(self, job: str) -> SimpleNamespace:
        self._looks += 1
        if self._looks < 3:
            return SimpleNamespace(status=JobStatus.RUNNING)
        status, code = self._ends.pop(0)
        return SimpleNamespace(status=status, driver_exit_code=code, message="the supervisor died")

    def get_job_logs(self, job: str) -> str:
        return self.log

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self._follows += 1
        yield self.log[:6]
        if self._follows == 1:
            raise aiohttp.ClientConnectionError("cut off")
        yield self.log[6:]


class WithoutLogs(ScriptedApi):
    """Its jobs end when their log was followed twice; of ended jobs it has none."""

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=JobStatus.SUCCEEDED if self._follows == 2 else JobStatus.RUNNING)

    def get_job_logs(self, job: str) -> str:
        raise RuntimeError("no log")


class WithSilentLogs(ScriptedApi):
    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield self.log[:6]
        await asyncio.Event().wait()


class Gone(ScriptedApi):
    def get_job_info(self, job: str) -> SimpleNamespace:
        raise ConnectionError("connection refused")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    monkeypatch.setattr(jobs, "LOST_AFTER_S", 0.05)


@pytest.fixture
def config() -> Config:
    run = RunSection(name="mine", root=Path("/shared/runs"))
    return resolve(Config(run=run, train=TrainSection(timeout_s=90.5)))


def submit(monkeypatch, api: ScriptedApi, config: Config, **options) -> int:
    monkeypatch.setattr(jobs, "connect", lambda address: api)
    return jobs.submit_run(config, **{"address": ADDRESS, "wait": True, "retries": 0, "resume": False, **options})


@pytest.mark.parametrize(
    ("status", "driver_exit_code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 130, 130),
        (JobStatus.FAILED, 127, 127),
        (JobStatus.FAILED, None, 1),  # its process never started
        (JobStatus.FAILED, -9, 1),  # a signal ended it
        (JobStatus.STOPPED, None, 130),
    ],
)
def test_the_exit_status_of_a_job_is_that_of_its_run(status, driver_exit_code, expected):
    assert jobs.exit_status(status, driver_exit_code) == expected


@given(status=st.integers(0, 255), attempt=st.integers(0, 5), retries=st.integers(0, 5))
def test_what_is_done_or_cannot_work_or_was_stopped_is_never_sent_again_and_nothing_more_often_than_told(
    status, attempt, retries
):
    assert jobs.is_sent_again(status, attempt=attempt, retries=retries) == (
        status not in {0, 2, 130} and attempt < retries
    )


def test_the_option_wins_over_the_variable_and_the_variable_over_the_default():
    environment = {"RAY_API_SERVER_ADDRESS": "http://there:1", "RAY_ADDRESS": "gcs:6379"}
    assert jobs.job_api_address("http://here:2/", environment) == "http://here:2"
    assert jobs.job_api_address(None, environment) == "http://there:1"
    assert jobs.job_api_address(None, {"RAY_ADDRESS": "gcs:6379"}) == "http://127.0.0.1:8265"


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto"])
def test_an_address_that_is_no_url_is_refused(address):
    with pytest.raises(ConfigError) as refused:
        jobs.job_api_address(address, {})
    assert refused.value.what == f"--address {address}" and "8265" in refused.value.remedy


def test_an_address_where_nothing_answers_is_a_config_error(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")  # would win, were it asked
    with pytest.raises(ConfigError) as refused:
        jobs.connect("http://127.0.0.1:9")  # the discard port: nobody listens there
    assert "127.0.0.1:9" in refused.value.got and "ray start --head" in refused.value.remedy


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-port", "ray://127.0.0.1:9"])
def test_a_cluster_that_cannot_be_joined_is_a_config_error_at_once(monkeypatch, address):
    for variable in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):  # set for good otherwise
        monkeypatch.setenv(variable, "0")
    with pytest.raises(ConfigError) as refused, ray_cluster(RaySection(address=address), namespace="n"):
        pass
    assert address in refused.value.what and "RAY_AUTH_MODE=token" in refused.value.remedy


@pytest.fixture
def head(tmp_path) -> Iterator[Path]:
    """A head's folder of programs: a python3 that tells its process id and its words."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python3", "mine"):
        (programs / name).write_text('#!/bin/sh\necho "$0" $$ "$@"\n')
        (programs / name).chmod(0o755)
    yield programs


@pytest.mark.parametrize(
    ("has_python", "resume", "words"),
    [
        (True, False, "-m rlsys train config.yaml"),
        (False, True, "-m rlsys train config.yaml --resume"),
    ],
)
def test_the_jobs_command_is_one_process_of_the_senders_python_or_else_of_the_heads_own(
    head, has_python, resume, words
):
    python = str(head / ("mine" if has_python else "no such python"))
    shell = subprocess.Popen(
        jobs.entrypoint(python, resume=resume),
        shell=True,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": f"{head}:{os.environ['PATH']}"},
    )
    said, _ = shell.communicate(timeout=30)
    program = head / ("mine" if has_python else "python3")
    assert said == f"{program} {shell.pid} {words}\n"


def test_a_stopped_job_has_time_for_a_step_and_a_checkpoint_and_the_end(config):
    assert jobs.stop_wait_s(config) == 272 + 60


def test_a_job_gets_the_resolved_config_alone_and_its_run_folder_lies_elsewhere(monkeypatch, config):
    api = ScriptedApi((JobStatus.SUCCEEDED, 0))
    assert submit(monkeypatch, api, config, resume=True) == 0
    (sent,) = api.sent
    assert api.configs == [config]
    assert not Path(sent["runtime_env"]["working_dir"]).exists()
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "332"}
    assert sent["metadata"] == {"job_name": "mine", "run_folder": "/shared/runs/mine"}
    assert sent["submission_id"].startswith("mine-") and sent["entrypoint"].endswith(" --resume")


@pytest.mark.parametrize(
    ("api", "expected"),
    [
        (WithoutLogs(), "one\ntwo\nthree\nthe end of the log of job j-1 cannot be read: no log\n"),
        (WithSilentLogs((JobStatus.SUCCEEDED, 0)), "one\ntwo\nthree\n"),
        (ScriptedApi((JobStatus.SUCCEEDED, 0)), "one\ntwo\nthree\n"),
    ],
    ids=["cut off", "silent", "whole"],
)
def test_a_log_whose_connection_breaks_or_falls_silent_is_shown_whole_and_once(api, expected):
    shown: list[str] = []
    asyncio.run(asyncio.wait_for(jobs.follow(api, "j-1", shown.append), timeout=60))
    assert "".join(shown) == expected


@given(pieces=st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=5))
def test_a_log_is_shown_whole_and_once_however_it_is_cut(pieces: Sequence[Sequence[int]]):
    """Each inner list is one connection: where the pieces of its part of the log end."""
    text = "abcdefghijklmnopqrstuvwxyz"
    shown: list[str] = []
    log = jobs._Log(shown.append)
    for connection in pieces:
        end = 0
        for cut in sorted(connection):
            end = log.show(text[end:cut], start=end)
    log.show(text, start=0)
    assert "".join(shown) == text


def test_a_failed_run_is_sent_again_with_resume_as_often_as_told_and_each_time_it_is_said(monkeypatch, config, capsys):
    api = ScriptedApi((JobStatus.FAILED, 1), (JobStatus.FAILED, None), (JobStatus.SUCCEEDED, 0))
    assert submit(monkeypatch, api, config, retries=2) == 0
    assert [str(sent["entrypoint"]).endswith(" --resume") for sent in api.sent] == [False, True, True]
    assert len({sent["submission_id"] for sent in api.sent}) == 3
    said = capsys.readouterr().out
    assert "retry 1 of 2" in said and "retry 2 of 2" in said and "failed: the supervisor died" in said


@pytest.mark.parametrize(
    ("end", "expected"),
    [((JobStatus.FAILED, 2), 2), ((JobStatus.STOPPED, None), 130), ((JobStatus.FAILED, -9), 1)],
)
def test_no_retry_is_left_or_wanted(monkeypatch, config, end, expected):
    api = ScriptedApi(end, end)
    assert submit(monkeypatch, api, config, retries=1) == expected
    assert len(api.sent) == (2 if expected == 1 else 1)


class Starting(ScriptedApi):
    """A cluster whose agent answers at the third question, or never."""

    def __init__(self, *ends: tuple[JobStatus, int | None], ready_after: int | None = 3):
        super().__init__(*ends)
        self.ready_after = ready_after
        self.asked: list[str] = []

    def submit_job(self, **request) -> str:
        self.asked.append(request["submission_id"])
        if self.ready_after is None or len(self.asked) < self.ready_after:
            raise RuntimeError(
                "Request failed with status code 500: No available agent to submit job, please try again"
            )
        return super().submit_job(**request)


def test_a_cluster_that_is_still_starting_is_asked_again_for_the_same_job(monkeypatch, config, capsys):
    monkeypatch.setattr(jobs, "LOST_AFTER_S", 30.0)
    api = Starting((JobStatus.SUCCEEDED, 0))
    assert submit(monkeypatch, api, config) == 0
    assert len(api.sent) == 1 and len(api.asked) == 3 and len(set(api.asked)) == 1
    assert capsys.readouterr().out.count("still starting") == 2


def test_a_cluster_that_never_comes_up_is_given_up_with_its_words(monkeypatch, config):
    api = Starting(ready_after=None)
    with pytest.raises(RlsysError, match=r"did not take the job: .*No available agent"):
        submit(monkeypatch, api, config)
    assert len(api.asked) > 1 and api.sent == []


def test_retries_without_waiting_are_refused_before_anything_is_sent(monkeypatch, config):
    api = ScriptedApi()
    with pytest.raises(ConfigError, match="--no-wait"):
        submit(monkeypatch, api, config, wait=False, retries=1)
    assert api.sent == []


def test_a_job_that_is_not_waited_for_is_named_with_the_commands_to_follow_and_to_stop_it(monkeypatch, config, capsys):
    api = ScriptedApi()
    assert submit(monkeypatch, api, config, wait=False) == 0
    job, said = api.sent[0]["submission_id"], capsys.readouterr().out
    assert f"ray job logs --follow --address {ADDRESS} {job}" in said
    assert f"ray job stop --address {ADDRESS} {job}" in said


def test_a_cluster_that_answers_no_more_ends_the_wait_with_the_reason_and_the_job():
    with pytest.raises(RlsysError, match=r"told nothing of job j-1 for .*connection refused"):
        asyncio.run(jobs.follow(Gone(), "j-1", lambda text: None))


def test_an_interrupted_wait_leaves_the_job_and_says_how_to_stop_it(monkeypatch, config, capsys):
    api = ScriptedApi()
    api.get_job_info = lambda job: os.kill(os.getpid(), signal.SIGINT) or SimpleNamespace(status=JobStatus.RUNNING)
    assert submit(monkeypatch, api, config, retries=3) == 130
    said = capsys.readouterr().out.splitlines()
    assert len(api.sent) == 1
    assert said[-1].endswith(f"which goes on; stop it: ray job stop --address {ADDRESS} {api.sent[0]['submission_id']}")


JOB_FOLDER = "session_x/runtime_resources/working_dir_files/_ray_pkg_1"


def config_file(folder: Path, **run: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({"run": run, "data": {"task": {"name": "reversed_sum"}}}))
    return folder / "run.yaml"


@pytest.mark.parametrize("run", [{}, {"root": "runs"}, {"root": "sub/../runs"}])
def test_runs_inside_the_folder_that_ray_deletes_after_a_job_are_refused(tmp_path, monkeypatch, run):
    file = config_file(tmp_path / JOB_FOLDER, **run)
    monkeypatch.chdir(file.parent)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert refused.value.what == "run.root" and JOB_FOLDER in refused.value.got
    assert "absolute" in refused.value.wanted and refused.value.remedy == "run.root=/shared/runs"


def test_runs_outside_of_a_jobs_folder_are_taken(tmp_path, monkeypatch):
    file = config_file(tmp_path / JOB_FOLDER)
    monkeypatch.chdir(file.parent)
    assert load_config(file, ["run.root=/shared/runs"]).run.root == Path("/shared/runs")
    monkeypatch.chdir(tmp_path)
    assert load_config(file).run.root == tmp_path / "runs"


def test_submit_hands_on_the_resolved_config_and_every_option_and_exits_as_the_run_did(tmp_path, monkeypatch):
    given: list[object] = []
    monkeypatch.setattr(jobs, "submit_run", lambda config, **options: given.append((config, options)) or 130)
    monkeypatch.chdir(tmp_path)
    words = [str(config_file(tmp_path)), "run.name=mine", "--address", ADDRESS, "--retries", "2", "--resume"]
    assert CliRunner().invoke(cli.app, ["submit", *words]).exit_code == 130
    ((config, options),) = given
    assert (config.run.root, config.run.name, config.algo.loss.name) == (tmp_path / "runs", "mine", "ppo_clip")
    assert options == {"address": ADDRESS, "wait": True, "retries": 2, "resume": True}


@pytest.mark.parametrize("word", ["rollout.max_stalness=1", "algo.correction={name: none}"])
def test_a_config_that_cannot_work_is_never_sent(tmp_path, monkeypatch, word):
    monkeypatch.setitem(sys.modules, "rlsys.actors.jobs", None)  # importing it, as sending needs, would raise
    ended = CliRunner().invoke(cli.app, ["submit", str(config_file(tmp_path, root=str(tmp_path / "runs"))), word])
    assert ended.exit_code == 2 and "remedy:" in ended.stderr
