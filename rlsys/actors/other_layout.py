"""A resumed run whose learner is laid out otherwise than its checkpoint: refused, or converted, before actors start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlsys.actors.checkpoint import Start
from rlsys.actors.inputs import Inputs
from rlsys.config.schema import Config
from rlsys.train import resume
from rlsys.train.base import check_base
from rlsys.train.checkpoint import CRITIC_FOLDER, Layout, is_readable, saved_layout


def check_learner(config: Config, inputs: Inputs, start: Start) -> None:
    """Whether the learner that ``start`` has was saved of this model, and can be brought into this layout.

    Raises:
        ConfigError: it was not, or cannot.
        CheckpointDamaged: it does not say.
    """
    if start.learner is None:
        return
    folder = Path(start.learner)
    resume.check_model(folder, inputs.model_path, "model.path")
    if (folder / CRITIC_FOLDER).is_dir():
        resume.check_model(folder / CRITIC_FOLDER, inputs.critic_path or inputs.model_path, "critic.path")
    check_base(folder, inputs.model_path)
    moves_reference = bool(config.algo.reference_every_steps) and config.train.lora is None
    resume.check_layout(folder, config.train, moves_reference=moves_reference)


def in_layout(config: Config, start: Start, tell: Callable[[str], None]) -> Start:
    """``start`` with a learner that can be read under the layout of ``config``; it is converted where that differs.

    Raises:
        CheckpointDamaged: it cannot be converted.
        WaitTimeout: not within ``train.start_timeout_s``.
    """
    if start.learner is None:
        return start
    folder = Path(start.learner)
    saved, wanted = saved_layout(folder), Layout.of(config.train, world_size=config.train.processes)
    if is_readable(saved, wanted):
        return start
    then, now = resume.told_layout(saved, wanted), resume.told_layout(wanted, saved)
    tell(f"the checkpoint was saved with {then}: converting it for {now}")
    resume.convert(folder, _converted(folder), config.train.start_timeout_s)
    return replace(start, learner=str(_converted(folder)))


def remove_converted(start: Start) -> None:
    """Once the learner is up. What a killed run leaves is removed with the next checkpoint."""
    if start.learner is not None and start.learner.endswith(_SUFFIX):
        shutil.rmtree(start.learner, ignore_errors=True)


_SUFFIX = ".converted"  # known to checkpoints/store, which removes it


def _converted(learner: Path) -> Path:
    return learner.parent.with_name(f".{learner.parent.name}{_SUFFIX}")
