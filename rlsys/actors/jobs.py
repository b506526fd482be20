"""Runs as Ray jobs: sent to a running cluster, followed there, and sent again where they failed.

Ray runs a job's command in a folder of its own, which it deletes later, and does not run a failed job again.
"""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from rlsys.actors.cluster import first_sentence
from rlsys.config.load import dump_config
from rlsys.config.schema import Config
from rlsys.errors import CONFIG_ERROR, DONE, FAILED, INTERRUPTED, ConfigError, RlsysError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # the dashboard of a cluster started here by `ray start --head`
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
CONFIG_FILE = "config.yaml"
POLL_S = 2.0  # between two looks at a job
REQUEST_TIMEOUT_S = 30.0
LOST_AFTER_S = 60.0  # without an answer the cluster counts as gone
NO_AGENT = "No available agent"  # Ray's words where the process of the head that starts jobs has not come up yet
ORDERLY_END_S = 60  # for a stopped run to end its actors and write its last files, beside the step and the checkpoint


class JobApi(JobSubmissionClient):
    """Ray's client with a deadline for every request; without one it would wait for a silent cluster for ever."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, timeout=REQUEST_TIMEOUT_S, **kwargs)


def submit_run(config: Config, *, address: str | None, wait: bool, retries: int, resume: bool) -> int:
    """Run ``config`` (resolved, its paths absolute) as a job of a running cluster. Returns the exit status: the run's
    own, 130 for a job that was stopped, and 0 at once where it is not waited for.

    Args:
        address: URL of the cluster's dashboard; None means RAY_API_SERVER_ADDRESS, or else ``DEFAULT_ADDRESS``.
        wait: show the job's log until it ends.
        retries: how often a failed run is sent again, to resume from its last checkpoint.
        resume: go on from the last checkpoint of the run folder.

    Raises:
        ConfigError: no cluster answers at the address, or it wants a token; or retries without waiting.
        RlsysError: the cluster did not take the job, or stopped answering.
    """
    if retries and not wait:
        raise ConfigError(
            f"--retries {retries}",
            got="--no-wait beside it",
            wanted="a command that waits: whoever sends a failed run again must see it fail",
            remedy="remove --no-wait or --retries",
        )
    address = job_api_address(address, os.environ)
    api = connect(address)
    attempt = 0
    while True:
        job = send(api, config, resume=resume or attempt > 0)
        log, stop = (f"ray job {command} --address {address} {job}" for command in ("logs --follow", "stop"))
        _say(f"sent to {address} as job {job}\n  its log: {log}\n  stop it: {stop}")
        if not wait:
            return DONE
        try:
            end = asyncio.run(follow(api, job, _show))
        except KeyboardInterrupt:
            _say(f"no longer following job {job}, which goes on; stop it: {stop}")
            return INTERRUPTED
        status = exit_status(end.status, end.driver_exit_code)
        _say(f"job {job} {in_words(end)}")
        if not is_sent_again(status, attempt=attempt, retries=retries):
            return status
        attempt += 1
        _say(f"sent again, with --resume: retry {attempt} of {retries}")


def exit_status(status: JobStatus, driver_exit_code: int | None) -> int:
    """Exit status of the run that an ended job was. Ray tells no exit code of a stopped job, nor of one whose process
    never started; a process that died by a signal has a negative one."""
    if status == JobStatus.STOPPED:
        return INTERRUPTED
    if status == JobStatus.SUCCEEDED:
        return DONE
    return driver_exit_code if driver_exit_code is not None and driver_exit_code > 0 else FAILED


def in_words(end: JobDetails) -> str:
    """How a job ended, for the person who waited for it."""
    if end.status != JobStatus.FAILED:
        return {JobStatus.STOPPED: "was stopped", JobStatus.SUCCEEDED: "is done"}[end.status]
    if end.driver_exit_code is None:
        return f"failed: {end.message}"
    if end.driver_exit_code < 0:
        return f"failed: signal {-end.driver_exit_code} killed its process (9: often by the kernel, out of memory)"
    return f"ended with status {end.driver_exit_code}"


def is_sent_again(status: int, *, attempt: int, retries: int) -> bool:
    """Whether a job that ended with exit status ``status`` is sent once more after ``attempt`` earlier retries. A
    config that cannot work will not work the next time, and who stopped a run did not want it."""
    return status not in (DONE, CONFIG_ERROR, INTERRUPTED) and attempt < retries


def job_api_address(option: str | None, environment: Mapping[str, str]) -> str:
    """Where the cluster takes jobs. Raises ConfigError where that is no URL: Ray would take it for another port."""
    address = option or environment.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    if urlsplit(address).scheme not in ("http", "https"):
        raise ConfigError(
            f"--address {address}" if option else f"{ADDRESS_VARIABLE}={address}",
            got="no http or https URL",
            wanted=f"the URL of the cluster's dashboard, as in {DEFAULT_ADDRESS}",
            remedy="`ray start --head` prints it; the port is 8265 unless --dashboard-port was given there",
        )
    return address.rstrip("/")


def connect(address: str) -> JobApi:
    """The job API at ``address``. Raises ConfigError where no cluster answers there, or it wants a token."""
    os.environ[ADDRESS_VARIABLE] = address  # Ray's client prefers this variable, and RAY_ADDRESS, to what it is given
    try:
        return JobApi(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address}",
            got=first_sentence(error),
            wanted="the token with which the cluster was started",
            remedy="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token or RAY_AUTH_TOKEN_PATH to a file of it "
            "(otherwise ~/.ray/auth_token is read)",
        ) from error
    except (OSError, RuntimeError, KeyError) as error:  # errors of requests are OSErrors
        raise ConfigError(
            f"the cluster at {address}",
            got=f"no Ray job API there: {first_sentence(error)}",
            wanted="the dashboard of a running cluster",
            remedy="start a cluster with `ray start --head`, or name another one with --address or "
            f"{ADDRESS_VARIABLE}; `rlsys train` needs none",
        ) from error


def send(api: JobApi, config: Config, *, resume: bool) -> str:
    """Send one attempt of the run; returns the job's id. A cluster that is still starting is given ``LOST_AFTER_S``.
    Raises RlsysError where the cluster does not take it."""
    job = f"{config.run.name}-{uuid.uuid4().hex[:8]}"
    deadline_s = time.monotonic() + LOST_AFTER_S
    with tempfile.TemporaryDirectory(prefix="rlsys-job-") as folder:
        (Path(folder) / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
        while True:
            try:
                return api.submit_job(
                    entrypoint=entrypoint(sys.executable, resume=resume),
                    submission_id=job,  # the same each time: Ray takes an id once
                    runtime_env={
                        "working_dir": folder,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s(config))},
                    },
                    metadata={"job_name": config.run.name, "run_folder": str(config.run.root / config.run.name)},
                )
            except (OSError, RuntimeError, RayError) as error:
                if NO_AGENT not in str(error) or time.monotonic() > deadline_s:
                    raise RlsysError(f"the cluster at {api.get_address()} did not take the job: {error}") from error
                _say(f"the cluster at {api.get_address()} is still starting")
            time.sleep(POLL_S)


def entrypoint(python: str, *, resume: bool) -> str:
    """The job's command: one process, so that the signal of `ray job stop` reaches the run and no shell before it.
    ``python`` where the head has it, else its own."""
    train = f"-m rlsys train {CONFIG_FILE}" + (" --resume" if resume else "")
    return f'P={shlex.quote(python)}; [ -x "$P" ] || P=python3; exec "$P" {train}'


def stop_wait_s(config: Config) -> int:
    """Seconds that `ray job stop` waits before it kills (3 unless told): a step, the copy for a checkpoint and its
    writing, each of which may take ``train.timeout_s``, and the orderly end."""
    return math.ceil(3 * config.train.timeout_s) + ORDERLY_END_S


async def follow(api: JobApi, job: str, show: Callable[[str], None]) -> JobDetails:
    """Show a job's log until the job has ended, the whole of it and nothing twice.

    Raises:
        RlsysError: the cluster has not told how the job stands for ``LOST_AFTER_S``.
    """
    log = _Log(show)
    tail = asyncio.create_task(_show_as_it_comes(api, job, log))
    try:
        details = await _ended(api, job)
    finally:
        tail.cancel()
        with suppress(asyncio.CancelledError):
            await tail
    try:
        log.show(api.get_job_logs(job), start=0)
    except (OSError, RuntimeError, RayError) as error:
        show(f"the end of the log of job {job} cannot be read: {error}\n")
    return details


class _Log:
    """Shows pieces of a log that grows, each character once, whatever piece it comes in."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._shown_chars = show, 0

    def show(self, text: str, start: int) -> int:
        """Show what is new of a piece that begins at character ``start``; returns where the piece ends."""
        new = text[max(0, self._shown_chars - start) :]
        if new:
            self._show(new)
        self._shown_chars = max(self._shown_chars, start + len(text))
        return start + len(text)


async def _show_as_it_comes(api: JobApi, job: str, log: _Log) -> None:
    """Runs until cancelled. A connection that ends or breaks says nothing about the job: the log is then followed
    again, from its beginning, since Ray can do no other."""
    while True:
        end = 0
        try:
            async with aclosing(api.tail_job_logs(job)) as pieces:
                async for piece in pieces:
                    end = log.show(piece, start=end)
        except (aiohttp.ClientError, OSError, RuntimeError):
            pass
        await asyncio.sleep(POLL_S)


async def _ended(api: JobApi, job: str) -> JobDetails:
    answered_s = time.monotonic()
    while True:
        try:
            details = api.get_job_info(job)
            answered_s = time.monotonic()
            if details.status.is_terminal():
                return details
        except (OSError, RuntimeError, RayError) as error:
            silent_s = time.monotonic() - answered_s
            if silent_s > LOST_AFTER_S:
                raise RlsysError(
                    f"the cluster at {api.get_address()} has told nothing of job {job} for {silent_s:.0f} s: {error}\n"
                    f"Where the cluster still runs, so may the job: ray job status --address {api.get_address()} {job}"
                ) from error
        await asyncio.sleep(POLL_S)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(sentence: str) -> None:
    print(sentence, flush=True)
