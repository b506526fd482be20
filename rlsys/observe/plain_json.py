"""Values as strict JSON knows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def as_plain_json(value: Any) -> Any:
    """``value`` with plain types only: NaN and infinities become None (JSON has no such numbers), numpy scalars and
    arrays become numbers and lists, what JSON does not know becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): as_plain_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain_json(part) for part in value]
    if isinstance(value, np.generic | np.ndarray):
        return as_plain_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)
