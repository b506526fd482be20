"""What must hold across sections before an actor starts (law 9: a config that cannot work fails before that).

Every check is a function of its own with its own message. What needs a look at other things (the model's folder, the
data, the reward function, the algorithm's tables) stands in ``plan/references``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rlsys.config.load import dump_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError

RUN_FILES = {
    "config.yaml",
    "metrics.jsonl",
    "commits.jsonl",
    ".lock",
    "result.json",
    "log.txt",
    "rollouts",
    "tensorboard",
    "checkpoints",
    "model",
    "adapter",
    "trace.json",
    "report.html",
}


# What a resumed run may change: how far it goes and what it runs on, nothing of what it learns from and how.
CHANGEABLE = re.compile(
    r"run\.steps|(checkpoint|eval|observe|ray)\..*|.*timeout_s"
    r"|reward\.(workers|max_drops_in_a_row)|rollout\.(replicas|slots|weight_channel|vllm.*|[cg]pus_per_replica)"
    r"|train\.([cg]pus_per_rank|rewarm_steps|ranks|tensor_parallel|zero_stage)"
    r"|teacher\.(slots|vllm.*|[cg]pus)"
)


def check_sections(config: Config, *, resume: bool = False) -> None:
    """Check the sections of a resolved config against one another. Looks at nothing but the run folder.

    Args:
        resume: the run goes on in its folder.

    Raises:
        ConfigError: the first thing found that cannot work.
    """
    check_staleness_is_corrected(config)
    check_replicas_take_room(config)
    check_batch_can_be_divided(config)
    check_token_budget(config)
    check_pass_at(config)
    check_data_is_named_once(config)
    check_run_folder(config, resume=resume)


def check_staleness_is_corrected(config: Config) -> None:
    correction = config.algo.correction
    uncorrected = (correction is None or correction.name == "none") and config.algo.anchor != "behaviour"
    if config.rollout.max_staleness > 0 and uncorrected and not config.algo.allow_uncorrected:
        raise ConfigError(
            "algo.correction",
            got=f"none, while rollout.max_staleness={config.rollout.max_staleness}",
            wanted="a correction for tokens that an older policy sampled",
            remedy="set algo.correction={name: tis}, or algo.anchor=behaviour, or rollout.max_staleness=0, or "
            "algo.allow_uncorrected=true if uncorrected stale data is what you want",
        )


def check_replicas_take_room(config: Config) -> None:
    rollout = config.rollout
    if rollout.num_replicas is None and rollout.cpus_per_replica == rollout.gpus_per_replica == 0:
        raise ConfigError(
            "rollout.replicas=auto",
            got="replicas that take neither CPUs nor GPUs: any number of them would fit",
            wanted="rollout.cpus_per_replica or rollout.gpus_per_replica above 0",
            remedy="set one of them, or give a number of replicas",
        )


def check_batch_can_be_divided(config: Config) -> None:
    """Every optimizer step needs a rollout for every rank."""
    rollouts = config.rollouts_per_batch
    needed = config.train.steps_per_batch * config.train.ranks
    if needed > rollouts:
        raise ConfigError(
            f"train.steps_per_batch={config.train.steps_per_batch}",
            got=f"{rollouts} rollouts a batch for {config.train.steps_per_batch} optimizer steps on "
            f"{config.train.ranks} ranks",
            wanted=f"at least {needed} rollouts a batch, one for each step and rank",
            remedy="lower train.steps_per_batch or train.ranks, or raise train.prompts_per_batch or rollout.group_size",
        )


def check_token_budget(config: Config) -> None:
    train = config.train
    has_budget = train.tokens_per_batch is not None
    if has_budget != (train.batch_by != "prompts"):
        raise ConfigError(
            "train.tokens_per_batch",
            got=f"{train.tokens_per_batch} with train.batch_by={train.batch_by}",
            wanted="a budget of tokens where batches are made by tokens, and only there",
            remedy="remove train.tokens_per_batch, or set train.batch_by=trained_tokens or sampled_tokens"
            if has_budget
            else "set train.tokens_per_batch, or train.batch_by=prompts",
        )
    longest = config.rollout.group_size * config.rollout.max_tokens
    if train.tokens_per_batch is not None and train.tokens_per_batch < longest:
        raise ConfigError(
            "train.tokens_per_batch",
            got=str(train.tokens_per_batch),
            wanted=f"at least rollout.group_size x rollout.max_tokens = {longest}: the longest group must fit",
            remedy="raise it, or lower rollout.group_size or rollout.max_tokens",
        )


def check_pass_at(config: Config) -> None:
    if config.eval.samples == 0:
        return
    wrong = [k for k in config.eval.pass_at if not 1 <= k <= config.eval.samples]
    if wrong:
        raise ConfigError(
            "eval.pass_at",
            got=f"k = {', '.join(map(str, wrong))} with eval.samples={config.eval.samples}",
            wanted="every k from 1 to eval.samples",
            remedy="raise eval.samples or remove that k",
        )


def check_data_is_named_once(config: Config) -> None:
    has_file, has_task = config.data.train_path is not None, config.data.task is not None
    if has_file == has_task:
        raise ConfigError(
            "data.train_path and data.task",
            got="both" if has_file else "neither",
            wanted="exactly one: a file of questions or a generated task",
            remedy="remove one"
            if has_file
            else "set data.train_path=questions.jsonl, or data.task={name: reversed_sum}",
        )
    if has_task and config.data.eval_path is not None:
        raise ConfigError(
            "data.eval_path",
            got=f"{config.data.eval_path} beside a generated task",
            wanted="a held-out file only beside data.train_path: a task's held-out questions are split off its own",
            remedy="remove data.eval_path, or give data.train_path instead of data.task",
        )


def check_run_folder(config: Config, *, resume: bool) -> None:
    """A run never writes into the folder of another one. One that trained no batch may be started again, any other is
    gone on with."""
    folder = config.run.root / config.run.name
    what, wanted = f"run.name={config.run.name}", "a new run folder"
    remedy = f"choose another run.name, or delete the folder: rm -r {folder}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(what, got=f"{folder} is a file", wanted=wanted, remedy=remedy)
    strange = sorted(path.name for path in folder.iterdir() if path.name not in RUN_FILES) if folder.is_dir() else []
    if strange:
        raise ConfigError(
            what, got=f"{folder} holds other things than a run: {strange[0]}", wanted=wanted, remedy=remedy
        )
    metrics, commits = folder / "metrics.jsonl", folder / "commits.jsonl"
    if not any(path.is_file() and path.stat().st_size for path in (metrics, commits)):
        return
    differing = _differences(folder, config, except_for=CHANGEABLE if resume else None)
    if resume and not differing:
        return
    if resume:
        got = f"{folder} is a run with another config ({differing})"
        wanted = "the config of the run that is resumed; it may change run.steps, what it runs on and what it reports"
        remedy = "give those keys their values of then, or start a new run under another run.name"
    elif differing:
        got = f"{folder} is a run with another config ({differing})"
    else:
        got = f"{folder} is a {'finished' if (folder / 'result.json').exists() else 'started'} run of this config"
        remedy = f"go on with it: --resume; or {remedy}"
    raise ConfigError(what, got=got, wanted=wanted, remedy=remedy)


def _differences(folder: Any, config: Config, except_for: re.Pattern[str] | None) -> str:
    """Keys whose values differ between the run in the folder and this config, the first three of them in words."""
    try:
        there = dict(_flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        return f"its config.yaml cannot be read: {type(error).__name__}"
    here = dict(_flat(yaml.safe_load(dump_config(config))))
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    keys = [key for key in keys if except_for is None or not except_for.fullmatch(key)]
    shown = [f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys[:3]]
    return "; ".join(shown) + (f"; and {len(keys) - 3} more keys" if len(keys) > 3 else "")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
