"""Asynchronous reinforcement-learning post-training of language models, on vLLM, DeepSpeed and Ray.

    import rlsys
    result = rlsys.train("configs/quickstart.yaml", ["rollout.max_staleness=0"])

Importing this package imports none of those libraries.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsys.actors.run import RunResult
    from rlsys.config.schema import Config
    from rlsys.reward.result import RewardResult

__all__ = ["RewardResult", "RunResult", "run", "train"]
__version__ = "0.1.0"


def run(config: str | Path | Config, overrides: Sequence[str] = (), *, resume: bool = False) -> RunResult:
    """Train as ``config`` says, here: start or join Ray, run to the end, leave the run folder behind. The same as
    ``rlsys.train(...)``.

    Args:
        config: path of a YAML file, or a ``Config``.
        overrides: ``key=value`` words with dotted keys, which win over the file.
        resume: go on from the newest checkpoint in the run folder; start where there is none yet; do nothing where the
            run is finished.

    Raises:
        ConfigError: the configuration cannot work; nothing was started.
        RlsysError: the run failed.
    """
    from rlsys.config.load import apply_overrides, load_config
    from rlsys.config.presets import resolve
    from rlsys.config.schema import Config

    given = apply_overrides(config, overrides) if isinstance(config, Config) else load_config(config, overrides)
    resolved = resolve(given)
    from rlsys.plan.preflight import preflight, run_inputs

    found = preflight(resolved, resume=resume).found
    from rlsys.actors.run import finished, run_training

    if resume and (result := finished(resolved)) is not None:
        print(f"{result.folder} is finished, {result.figures['steps']} steps: nothing to do (run.steps=N goes further)")
        return result
    return run_training(resolved, run_inputs(resolved, found), resume=resume)


class _CallableModule(ModuleType):
    """``rlsys.train`` is the package of the learner and, called, the way to start a run: both names are public."""

    def __call__(
        self, config: str | Path | Config, overrides: Sequence[str] = (), *, resume: bool = False
    ) -> RunResult:
        return run(config, overrides, resume=resume)


importlib.import_module("rlsys.train").__class__ = _CallableModule


_PUBLIC = {"RunResult": "rlsys.actors.run", "RewardResult": "rlsys.reward.result"}  # imported at first use


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rlsys' has no attribute {name!r}")
