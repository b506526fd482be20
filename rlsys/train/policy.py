"""The model that is trained, as the configuration wants it: with adapters, or with frozen layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.config.schema import TrainSection
from rlsys.train.base import fingerprints
from rlsys.train.frozen import freeze, is_any_frozen
from rlsys.train.lora import leaves_base_alone, with_adapters
from rlsys.train.model import load_model


def load_policy(path: str, train: TrainSection) -> Any:
    """Raises ConfigError where ``train.lora`` or ``train.frozen`` does not fit the model in folder ``path``."""
    model: Any = load_model(path)
    if train.lora is not None:
        return with_adapters(model, train.lora)
    freeze(model, train.frozen)
    return model


def base_below(path: str, train: TrainSection, policy: Any) -> Mapping[str, str] | None:
    """Fingerprints of the files that what is not trained can be read from again, once the policy was loaded from
    ``path``; None where that is nothing, or was changed before the first step."""
    is_as_in_files = train.lora is None or leaves_base_alone(train.lora)
    return fingerprints(path) if is_any_frozen(policy) and is_as_in_files else None
