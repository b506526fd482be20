"""Runs as jobs of real Ray clusters: sent, refused, stopped, resumed, with and without tokens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.engines

CONFIG = """
run: {{name: {name}, root: {root}, steps: {steps}}}
model: {{path: {model}}}
data: {{task: {{name: reversed_sum}}, eval_questions: 20}}
rollout: {{max_staleness: 1, group_size: 4, max_tokens: 6}}
train: {{prompts_per_batch: 4}}
observe: {{tensorboard: false}}
"""
TOKEN = "0123456789abcdef" * 4
AGENT_HEALTH = "/api/local_raylet_healthz"  # of the process that starts jobs, the last to come up
START_TIMEOUT_S, STOP_TIMEOUT_S, RUN_TIMEOUT_S = 90, 40, 300

# joins or starts what the environment names, as a run does, and tells which cluster that is
JOIN = """
import os, ray
from rlsys.actors.cluster import ray_cluster
from rlsys.config.schema import RaySection
with ray_cluster(RaySection(dashboard=False), namespace="joined"):
    print("joined", ray.get_runtime_context().gcs_address, "mode", os.environ.get("RAY_AUTH_MODE"))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A Ray cluster of this machine: the URL that takes jobs, and the address that drivers join."""

    url: str
    gcs: str


def without_ray(**environment: str) -> dict[str, str]:
    """The environment of these tests with nothing in it that speaks of Ray, and what is given here."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment


def free_ports(number: int) -> Iterator[int]:
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("", 0))) for _ in range(number)]
        ports = [listener.getsockname()[1] for listener in listeners]
    yield from ports


@contextmanager
def ray_head(**environment: str) -> Iterator[Cluster]:
    """A cluster of one machine, with ports and files of its own. A loaded machine may fail to start it: tried twice."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = without_ray(RAY_USAGE_STATS_ENABLED="0", PATH=programs, **environment)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as root:  # a socket path has 107 bytes
        for attempt in ("1", "2"):
            folder = Path(root) / attempt
            port, agent_port = free_ports(2)
            url = f"http://127.0.0.1:{port}"
            head = start_head(folder, port, agent_port, environment)
            try:
                if has_started(head, folder, f"{url}/api/version", f"http://127.0.0.1:{agent_port}{AGENT_HEALTH}"):
                    gcs = (folder / "ray_current_cluster").read_text().strip()
                    yield Cluster(url=url, gcs=gcs)
                    return
            finally:
                stop_head(head)
        raise AssertionError((Path(root) / "2.log").read_text())


def start_head(folder: Path, port: int, agent_port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    names = ["port", "dashboard-agent-grpc-port", "runtime-env-agent-port"]
    names += ["ray-client-server-port", "metrics-export-port"]
    options = [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
    options += [f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    options += [f"--dashboard-agent-listen-port={agent_port}"]
    options += ["--min-worker-port=0", "--max-worker-port=0", "--num-cpus=4", "--object-store-memory=200000000"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options]
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def has_started(head: subprocess.Popen[bytes], folder: Path, *urls: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while head.poll() is None and time.monotonic() < deadline:
        if (folder / "ray_current_cluster").is_file() and all(map(answers, urls)):
            return True
        time.sleep(0.5)
    return False


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError as error:
        return error.code == 401  # it wants a token
    except OSError:
        return False
    return True


def stop_head(head: subprocess.Popen[bytes]) -> None:
    head.terminate()
    try:
        head.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(STOP_TIMEOUT_S)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_head(RAY_AUTH_MODE="disabled") as started:
        yield started


@pytest.fixture
def write_config(tmp_path: Path, model: Path) -> Callable[..., Path]:
    def write(**values: object) -> Path:
        file = tmp_path / "sent" / "run.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            CONFIG.format(**{"name": "job", "root": tmp_path / "runs", "steps": 2, "model": model} | values)
        )
        return file

    return write


def command(*words: object, environment: dict[str, str], timeout_s: float = RUN_TIMEOUT_S):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=timeout_s, env=environment
    )


def submit(*words: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return command("rlsys", "submit", *words, environment=environment)


def ray_job(*words: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return command("ray.scripts.scripts", "job", *words, environment=environment)


def join(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", JOIN], capture_output=True, text=True, timeout=RUN_TIMEOUT_S, env=environment
    )


def in_time(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def lines(ended: subprocess.CompletedProcess[str], start: str) -> Sequence[str]:
    return [line for line in ended.stdout.splitlines() if line.startswith(start)]


def test_what_a_job_finds_wrong_with_its_config_comes_back_as_status_2(cluster, write_config, tmp_path):
    file = write_config(model=tmp_path / "no-such-model")
    ended = submit(file, "--address", cluster.url, "--retries", 1, environment=without_ray())
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout.count(f"got:    {tmp_path}/no-such-model is no folder") == 1  # neither shown nor sent twice


def test_plain_ray_job_submit_trains_and_refuses_a_run_folder_that_ray_would_delete(cluster, write_config, tmp_path):
    environment = without_ray(RAY_API_SERVER_ADDRESS=cluster.url)
    words = ("submit", "--working-dir", write_config(root="runs").parent, "--", "rlsys", "train", "run.yaml")
    refused = ray_job(*words, environment=environment)
    assert refused.returncode == 1
    assert "config error: run.root" in refused.stdout and "inside the job's working folder" in refused.stdout

    ended = ray_job(*words, f"run.root={tmp_path}/runs", environment=environment)
    assert ended.returncode == 0, ended.stdout
    assert json.loads((tmp_path / "runs" / "job" / "result.json").read_text())["steps"] == 2


def test_a_run_that_is_stopped_midway_leaves_a_checkpoint_and_status_130_and_resumes_to_its_end(
    cluster, write_config, tmp_path
):
    file, folder = write_config(name="stopped", steps=100_000), tmp_path / "runs" / "stopped"
    environment = without_ray(RAY_API_SERVER_ADDRESS=cluster.url)
    words = [sys.executable, "-m", "rlsys", "submit", str(file), "--wait"]
    waiting = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        metrics = folder / "metrics.jsonl"
        in_time(
            lambda: waiting.poll() is not None or metrics.is_file() and metrics.stat().st_size, "no step was trained"
        )
        job = waiting.stdout.readline().split()[-1]
        assert ray_job("stop", job, environment=environment).returncode == 0
        said, _ = waiting.communicate(timeout=RUN_TIMEOUT_S)
    finally:
        waiting.kill()
    assert waiting.returncode == 130, said
    assert f"job {job} was stopped" in said
    steps = [int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")]
    assert steps, said

    last = max(steps) + 2
    ended = submit(file, f"run.steps={last}", "--resume", environment=environment)
    assert ended.returncode == 0, ended.stdout
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["exit"]) == (last, 0)
    commits = [json.loads(line) for line in (folder / "commits.jsonl").read_text().splitlines()]
    assert commits[-1]["version"] == f"0.{last}"  # nothing was lost: it is the same incarnation
    trained = [int(line.split()[1].partition("/")[0]) for line in lines(ended, "step ") if "/" in line.split()[1]]
    assert trained and min(trained) > max(steps) and max(trained) == last
    assert lines(ended, "done: accuracy")


def test_a_cluster_with_a_token_is_joined_and_sent_to_with_the_token_alone(write_config, tmp_path):
    home, file = tmp_path / "home", write_config(model=tmp_path / "no-such-model")
    home.mkdir()
    (file.parent / "join.py").write_text(JOIN)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with ray_head(HOME=str(home), **token) as cluster:
        nobody = without_ray(HOME=str(home), RAY_ADDRESS=cluster.gcs)
        refused = submit(file, "--address", cluster.url, environment=nobody)
        assert refused.returncode == 2 and "RAY_AUTH_MODE=token" in refused.stderr and "sent to" not in refused.stdout
        taken = submit(file, "--address", cluster.url, environment=nobody | token)
        assert taken.returncode == 2 and "no-such-model is no folder" in taken.stdout

        refused = join(nobody | {"RAY_AUTH_MODE": "token"})
        assert "rlsys.errors.ConfigError" in refused.stderr and "RAY_AUTH_TOKEN" in refused.stderr
        assert f"joined {cluster.gcs} mode token" in join(nobody | token).stdout
        words = ("submit", "--address", cluster.url, "--working-dir", file.parent, "--", "python", "join.py")
        joined = ray_job(*words, environment=without_ray(HOME=str(home), **token))
        assert f"joined {cluster.gcs} mode token" in joined.stdout
    assert list(home.iterdir()) == []


def test_a_cluster_without_a_token_is_joined_as_it_is_and_no_token_is_made(cluster, tmp_path):
    joined = join(without_ray(HOME=str(tmp_path), RAY_ADDRESS=cluster.gcs))
    assert f"joined {cluster.gcs} mode None" in joined.stdout, joined.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_names_no_cluster_starts_its_own_whatever_ray_start_left_behind_and_makes_no_token(tmp_path):
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")  # killed long ago
        started = join(without_ray(HOME=str(tmp_path), RAY_TMPDIR=folder))
    assert started.returncode == 0, started.stderr
    assert "joined" in started.stdout and "127.0.0.1:9 " not in started.stdout and "mode disabled" in started.stdout
    assert list(tmp_path.iterdir()) == []
