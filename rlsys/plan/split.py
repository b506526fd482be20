"""What `rlsys plan` works out: a run's split of its cores as it was measured, and what other splits would do."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config.load import load_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.observe.run_folder import RunFolder
from rlsys.plan.balance import (
    Side,
    Split,
    balanced,
    by_doubling,
    in_whole_cores,
    split_of,
    synchronous_rollouts_per_s,
)

ENGINES = "balance/engines"
RATES = ("balance/rollouts_made_per_s", "balance/rollouts_trained_per_s", ENGINES)  # what a run must have measured
# in metrics.jsonl, in result.json
IDLE = {"rollout": ("balance/rollout_idle", "idle/rollout"), "trainer": ("balance/trainer_idle", "idle/trainer")}
PACE = ("balance/rollouts_per_s", "rollouts_per_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The words of the command line.

    Attributes:
        target: config file or run folder; None where rates are given.
        overrides: ``key=value`` words, laid over the config of ``target``.
        rollout_rate, trainer_rate: rollouts per second of one core, in place of measured ones.
        cores: to be divided; None: as many as the config has.
        rollout_doubling, trainer_doubling: a side's rate with twice the cores / its rate.
    """

    target: Path | None = None
    overrides: Sequence[str] = ()
    rollout_rate: float | None = None
    trainer_rate: float | None = None
    cores: float | None = None
    rollout_doubling: float = 2.0
    trainer_doubling: float = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """What a config gives each side. ``unit``: "cores" or "GPUs"."""

    rollout: float
    trainer: float
    unit: str

    @property
    def all(self) -> float:
        return self.rollout + self.trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Both sides, and where that comes from.

    Attributes:
        idle: share of the time that each was idle; empty where only rates are given.
        rollouts_per_s: that they came to together; None likewise.
        engines: in service, on average; None likewise.
    """

    rollout: Side
    trainer: Side
    idle: Mapping[str, float]
    rollouts_per_s: float | None
    engines: float | None
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """The answer.

    Attributes:
        asked, config: what it answers; config is None where only rates are given.
        measured: the rates.
        unit: "cores" or "GPUs".
        cores: that are divided.
        splits: by name. ``present``: of the config; ``as measured``: of the run, where it is another one; ``balanced``:
            at theta*; ``whole``: the best one in whole cores, where there are two.
        in_turns_per_s: rollouts per second of synchronous training with all cores.
    """

    asked: Asked
    config: Config | None
    measured: Measured
    unit: str
    cores: float
    splits: Mapping[str, Split]
    in_turns_per_s: float

    @property
    def rollouts_per_batch(self) -> int | None:
        return None if self.config is None else self.config.rollouts_per_batch

    @property
    def reached(self) -> float | None:
        """Share of what its split could do that the run did: the rest went to waits that no split removes."""
        split = self.splits.get("as measured", self.splits.get("present"))
        if self.measured.rollouts_per_s is None or split is None:
            return None
        return self.measured.rollouts_per_s / split.rollouts_per_s

    @property
    def gain(self) -> float | None:
        """So many times as fast as now is the balanced split; None where there is no present one."""
        if "present" not in self.splits:
            return None
        return self.splits["balanced"].rollouts_per_s / self.splits["present"].rollouts_per_s

    @property
    def gain_over_turns(self) -> float:
        return self.splits["balanced"].rollouts_per_s / self.in_turns_per_s


def plan_split(asked: Asked) -> SplitPlan:
    """Work out the splits. Starts nothing.

    Raises:
        ConfigError: neither rates nor a run that measured them, rates or cores that cannot be, sides on different kinds
            of device.
    """
    _check_numbers(asked)
    config = None if asked.target is None else load_config(_config_of(asked.target), asked.overrides)
    ran = None
    if config is None or asked.rollout_rate is not None:
        measured = _given(asked)
    else:
        run = _run_folder(asked.target, config)
        config_ran = load_config(run.config_path)
        measured = _measured(asked, run, config_ran)
        ran = cores_of(config_ran, measured.engines)
    present = None if config is None else cores_of(config, config.rollout.num_replicas or measured.engines)
    cores = asked.cores if present is None else asked.cores or present.all
    assert cores is not None  # _check_numbers saw to it
    if present is not None and ran is not None and ran.unit != present.unit:
        raise ConfigError(
            "the split that is asked about",
            got=f"{present.unit}, while the run measured its rates on {ran.unit}",
            wanted="the kind of device that the rates were measured on",
            remedy="run a few steps there first",
        )
    rollout, trainer = measured.rollout, measured.trainer
    splits = {
        name: split_of(rollout, trainer, trainer_cores=one.trainer, rollout_cores=one.rollout)
        for name, one in (("as measured", ran if ran != present else None), ("present", present))
        if one is not None
    }
    splits["balanced"] = balanced(rollout, trainer, cores)
    if (whole := in_whole_cores(rollout, trainer, cores)) is not None:
        splits["whole"] = whole
    return SplitPlan(
        asked=asked,
        config=config,
        measured=measured,
        unit="cores" if present is None else present.unit,
        cores=cores,
        splits=splits,
        in_turns_per_s=synchronous_rollouts_per_s(rollout, trainer, cores),
    )


def write_plan(path: Path, plan: SplitPlan) -> None:
    """Write ``{"plan": where the rates are from, "figures": {...}}``."""
    content = {"plan": plan.measured.origin, "figures": figures_of(plan)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cores_of(config: Config, engines: float | None) -> Cores:
    """What both sides have with so many engines: GPUs where they are on GPUs, else cores. A teacher's are not among
    them.

    Raises ConfigError where nobody knows how many engines, one side is on GPUs and the other one is not, or one has no
    core of its own.
    """
    rollout, train = config.rollout, config.train
    if engines is None:
        raise ConfigError(
            "rollout.replicas",
            got="auto, and no run that measured how many engines that are",
            wanted="a number",
            remedy="add it, e.g. rollout.replicas=4",
        )
    is_gpu = rollout.gpus_per_replica > 0 or train.gpus_per_rank > 0
    kind = "gpus" if is_gpu else "cpus"
    cores = Cores(
        rollout=engines * (rollout.gpus_per_replica if is_gpu else rollout.cpus_per_replica),
        trainer=train.processes * (train.gpus_per_rank if is_gpu else train.cpus_per_rank),
        unit="GPUs" if is_gpu else "cores",
    )
    if cores.rollout > 0 and cores.trainer > 0:
        return cores
    raise ConfigError(
        f"rollout.{kind}_per_replica and train.{kind}_per_rank",
        got=f"{cores.rollout:g} {cores.unit} for the engines, {cores.trainer:g} for the trainer",
        wanted="some for each: only what both sides use can be moved between them",
        remedy="set both, or give --rollout-rate, --trainer-rate and --cores without a config",
    )


def figures_of(plan: SplitPlan) -> dict[str, float | str]:
    """Flat, by name. Rates are rollouts (or sampled tokens) per second; a core is a GPU where ``unit`` says so."""
    figures: dict[str, float | str] = {
        "unit": plan.unit,
        "trainer_share": plan.splits["balanced"].trainer_share,
        "speedup_over_in_turns": plan.gain_over_turns,
        "in_turns/rollouts_per_s": plan.in_turns_per_s,
    }
    if plan.gain is not None:
        figures["speedup_over_present"] = plan.gain
    if plan.measured.rollouts_per_s is not None and plan.reached is not None:
        figures["measured/rollouts_per_s"] = plan.measured.rollouts_per_s
        figures["measured/share_of_expected"] = plan.reached
    for name, side in (("rollout", plan.measured.rollout), ("trainer", plan.measured.trainer)):
        figures[f"{name}/rollouts_per_s"] = side.rollouts_per_s
        figures[f"{name}/rollouts_per_s_of_a_core"] = side.rollouts_per_s / side.cores
        figures[f"{name}/rollouts_per_s_of_a_part"] = side.rollouts_per_s / side.parts
        if side.tokens_per_s is not None:
            figures[f"{name}/tokens_per_s"] = side.tokens_per_s
        if name in plan.measured.idle:
            figures[f"{name}/idle"] = plan.measured.idle[name]
    for title, split in plan.splits.items():
        name = title.replace(" ", "_")
        figures[f"{name}/trainer_cores"] = split.trainer_cores
        figures[f"{name}/rollout_cores"] = split.rollout_cores
        figures[f"{name}/rollouts_per_s"] = split.rollouts_per_s
        figures[f"{name}/trainer_idle"] = split.trainer_idle
        figures[f"{name}/rollout_idle"] = split.rollout_idle
        figures[f"{name}/bottleneck"] = split.bottleneck.value
        if plan.rollouts_per_batch is not None:
            figures[f"{name}/step_s"] = split.step_s(plan.rollouts_per_batch)
    if plan.rollouts_per_batch is not None:
        figures["in_turns/step_s"] = plan.rollouts_per_batch / plan.in_turns_per_s
    return figures


# --- where the rates come from ------------------------------------------------------------------------------------


def _check_numbers(asked: Asked) -> None:
    numbers = {"--rollout-rate": asked.rollout_rate, "--trainer-rate": asked.trainer_rate, "--cores": asked.cores}
    for option, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ConfigError(option, got=f"{number:g}", wanted="a number above 0", remedy="correct it")
    doublings = {"--rollout-doubling": asked.rollout_doubling, "--trainer-doubling": asked.trainer_doubling}
    for option, number in doublings.items():
        if not 1.0 <= number <= 2.0:
            raise ConfigError(
                option,
                got=f"{number:g}",
                wanted="1 (more cores add nothing) to 2 (twice the cores, twice the rate)",
                remedy="correct it, or leave it out for 2",
            )
    if (asked.rollout_rate is None) != (asked.trainer_rate is None):
        missing = "--trainer-rate" if asked.trainer_rate is None else "--rollout-rate"
        raise ConfigError(missing, got="nothing", wanted="the rates of both sides", remedy=f"give {missing} too")
    if asked.target is None and (asked.rollout_rate is None or asked.cores is None):
        raise ConfigError(
            "CONFIG|RUN_FOLDER",
            got="nothing",
            wanted="a run that measured its rates, or the rates and the cores",
            remedy="name one: rlsys plan runs/NAME; or give --rollout-rate, --trainer-rate and --cores",
        )


def _config_of(target: Path) -> Path:
    if not target.is_dir():
        return target
    if (target / "config.yaml").is_file():
        return target / "config.yaml"
    raise ConfigError(
        f"RUN_FOLDER {target}",
        got="a folder without config.yaml",
        wanted="the folder of a run, runs/<run.name>, or a config file",
        remedy="name the run's folder",
    )


def _run_folder(target: Path | None, config: Config | None) -> RunFolder:
    """The folder to read. Raises ConfigError where that run never began."""
    assert target is not None and config is not None  # else the rates are given
    folder = target if target.is_dir() else config.run.root / config.run.name
    if (folder / "config.yaml").is_file():
        return RunFolder(folder.parent, folder.name)
    raise ConfigError(
        f"run folder {folder}",
        got="no run there",
        wanted="a run that measured its rates",
        remedy="train first (a few steps will do: run.steps=20), name another run with run.name=NAME, or give "
        "--rollout-rate and --trainer-rate",
    )


def _given(asked: Asked) -> Measured:
    assert asked.rollout_rate is not None and asked.trainer_rate is not None  # _check_numbers saw to it
    return Measured(
        rollout=Side(rollouts_per_s=asked.rollout_rate, cores=1.0, scaling=by_doubling(asked.rollout_doubling)),
        trainer=Side(rollouts_per_s=asked.trainer_rate, cores=1.0, scaling=by_doubling(asked.trainer_doubling)),
        idle={},
        rollouts_per_s=None,
        engines=None,
        origin="given",
    )


def _measured(asked: Asked, run: RunFolder, ran: Config) -> Measured:
    """What the run measured: over the whole of it where it has ended, else over its last steps."""
    result, row = run.read_result(), _last_row(run.metrics_path)
    ended = _has_rates(result)
    values = result if ended else row
    if not _has_rates(values):
        raise ConfigError(
            f"run folder {run.path}",
            got=f"no rates of both sides in {run.result_path.name} or in the last line of {run.metrics_path.name}",
            wanted="a run that trained a step or more",
            remedy="wait for its first steps, name another run, or give --rollout-rate and --trainer-rate",
        )
    steps = values["steps" if ended else "step"]
    engines = round(float(values[ENGINES]), 2)  # the clock's rounding is no other split
    cores = cores_of(ran, engines)
    return Measured(
        rollout=Side(
            rollouts_per_s=values[RATES[0]],
            cores=cores.rollout,
            parts=engines,
            tokens_per_s=_number(values, "balance/rollout_tokens_per_s"),
            scaling=by_doubling(asked.rollout_doubling),
        ),
        trainer=Side(
            rollouts_per_s=values[RATES[1]],
            cores=cores.trainer,
            parts=ran.train.ranks,
            tokens_per_s=_number(values, "balance/trainer_tokens_per_s"),
            scaling=by_doubling(asked.trainer_doubling),
        ),
        idle={side: share for side, names in IDLE.items() if (share := _number(values, names[int(ended)])) is not None},
        rollouts_per_s=_number(values, PACE[int(ended)]),
        engines=engines,
        origin=f"{run.path}, all {steps} steps" if ended else f"{run.path}, the last steps up to step {steps}",
    )


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl (a run may be writing the next one); empty where there is none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        last = deque(file, maxlen=2)
    whole = [line for line in last if line.endswith(b"\n")]
    row = json.loads(whole[-1]) if whole else {}
    return row if isinstance(row, dict) else {}


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) else None


def _has_rates(values: Mapping[str, Any]) -> bool:
    return all((_number(values, name) or 0.0) > 0 for name in RATES)
