"""Whether ``train.frozen`` leaves something to train, known from the names in the model."""

from __future__ import annotations

from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.skeleton import skeleton_of
from rlsys.train.frozen import freeze


def check_frozen(config: Config) -> None:
    """Raises ConfigError where a pattern matches nothing, or all of them everything, or adapters are trained."""
    if not config.train.frozen:
        return
    if config.train.lora is not None:
        raise ConfigError(
            "train.frozen",
            got=f"{', '.join(config.train.frozen)}, with train.lora",
            wanted="one of them: below adapters everything is frozen",
            remedy="leave train.frozen out",
        )
    freeze(skeleton_of(config.model.path), config.train.frozen)
