"""A learner goes on from its checkpoint under another layout, or on another number of processes: what cannot, and how
the others are brought there. Imports no torch: it is decided before an actor starts.

    from \\ to     ZeRO 0      ZeRO 1, 2, 3
    ZeRO 0        ranks*      converted      * read as it is, where tensor_parallel stays
    ZeRO 1, 2, 3  converted   converted

A conversion writes the state once more, in a form that any layout reads; the checkpoint stays as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rlsys.config.schema import TrainSection
from rlsys.errors import CheckpointDamaged, ConfigError, WaitTimeout
from rlsys.train.checkpoint import MODEL_FILE, Layout, is_readable, model_numbers, saved_layout

_ADAM = ("adam", "adamw")
_TOLD_LINES = 5  # of what a failed conversion printed


def check_model(folder: Path | str, model_path: Path | str, what: str) -> None:
    """Refuse a learner in ``folder`` that is of a model of another shape than that in ``model_path``.

    Args:
        what: the key that names the model.

    Raises:
        ConfigError: it is.
        CheckpointDamaged: it does not say.
    """
    path = Path(folder) / MODEL_FILE
    try:
        saved, here = json.loads(path.read_text(encoding="utf-8")), model_numbers(model_path)
        differing = [key for key in sorted(saved.keys() | here.keys()) if saved.get(key) != here.get(key)]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointDamaged(f"{path} cannot be compared with {model_path}: {error}") from error
    if differing:
        raise ConfigError(
            what,
            got=f"{model_path}, with " + ", ".join(f"{key}={here.get(key)}" for key in differing),
            wanted=f"the model of the checkpoint {folder}, with "
            + ", ".join(f"{key}={saved.get(key)}" for key in differing),
            remedy="put back the model that the run was started with, or start a new run under another run.name",
        )


def check_layout(folder: Path | str, train: TrainSection, *, moves_reference: bool) -> None:
    """Refuse a learner in ``folder`` that cannot be brought into the layout of ``train``.

    Args:
        moves_reference: whether the reference policy has weights of its own that are saved.

    Raises:
        ConfigError: it cannot.
        CheckpointDamaged: there is no learner.
    """
    saved, wanted = saved_layout(folder), Layout.of(train, world_size=train.processes)
    if is_readable(saved, wanted):
        return
    optimizer, reason = train.optimizer.name, None
    if saved.shares_out or wanted.shares_out:
        reason = "where experts or rows are shared out, the state is saved in pieces that nothing puts together"
    elif optimizer not in _ADAM:
        reason = f"the state of the optimizer {optimizer} is converted nowhere, that of adam and adamw is"
    elif train.offload != "none":
        reason = "the state of an offloaded optimizer is converted nowhere"
    elif train.dtype == "bfloat16" and 0 in (saved.zero_stage, wanted.zero_stage):
        reason = "without ZeRO, a bfloat16 model's optimizer is kept in a form that nothing else reads"
    elif moves_reference and saved.tensor_parallel != wanted.tensor_parallel:
        reason = "algo.reference_every_steps: the reference was saved in the pieces that its layers were cut into"
    if reason is not None:
        raise ConfigError(
            ", ".join(f"train.{key}={getattr(wanted, key)}" for key in differing_keys(saved, wanted)),
            got=f"{folder}, saved with {told_layout(saved, wanted)}; {reason}",
            wanted="the layout of the checkpoint",
            remedy=f"resume with {told_layout(saved, wanted)}",
        )


def differing_keys(saved: Layout, wanted: Layout) -> list[str]:
    keys = ("ranks", "tensor_parallel", "expert_parallel", "sequence_parallel", "zero_stage")
    return [key for key in keys if getattr(saved, key) != getattr(wanted, key)]


def told_layout(layout: Layout, other: Layout) -> str:
    """Where ``layout`` differs from the other one, as keys of the config."""
    return " ".join(f"train.{key}={getattr(layout, key)}" for key in differing_keys(layout, other))


def convert(folder: Path, out: Path, timeout_s: float) -> None:
    """Write the learner in ``folder`` into ``out``, in the form that every layout reads, with the parts below it that
    are learners themselves. Whole or not there.

    Raises:
        CheckpointDamaged: it cannot be converted.
        WaitTimeout: not within ``timeout_s`` seconds.
    """
    partial = out.with_name(out.name + ".partial")
    for path in (partial, out):
        if path.exists():
            shutil.rmtree(path)
    try:
        _convert(folder, partial, timeout_s)
        for below in sorted(path.parent for path in folder.glob("*/layout.json")):
            _convert(below, partial / below.name, timeout_s)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(folder: Path, out: Path, timeout_s: float) -> None:
    command = [sys.executable, "-m", "rlsys.train.universal", str(folder), str(out)]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True, env=_environment())
    except subprocess.TimeoutExpired:
        raise WaitTimeout(f"the conversion of {folder}", timeout_s) from None
    except subprocess.CalledProcessError as error:
        told = "\n".join((error.stderr or error.stdout).strip().splitlines()[-_TOLD_LINES:])
        raise CheckpointDamaged(f"{folder} could not be converted:\n{told}") from None


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
