"""Where a run stands between two steps: everything but the learner's weights, which are saved beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsys.records import START, DropCause, RolloutGroup, Version


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What a run goes on from.

    Attributes:
        version: of the weights.
        cursor: of the source, every draw that was handed out and neither trained, filtered nor given up included,
            except those of ``groups``; None at the very start.
        groups: finished groups that wait to be trained, in their order.
        trained: rollouts.
        groups_trained: groups, and so draws.
        dropped: rollouts by cause.
        given_up: draws that were lost and are not asked again.
        filtered: draws of whose groups ``algo.selection`` left nothing.
        totals: figures of the run so far, as ``Totals.saved`` gives them.

    Example:
        >>> RunState().version.step
        0
    """

    version: Version = START
    cursor: Mapping[str, Any] | None = None
    groups: tuple[RolloutGroup, ...] = ()
    trained: int = 0
    groups_trained: int = 0
    dropped: Mapping[DropCause, int] = field(default_factory=dict)
    given_up: int = 0
    filtered: int = 0
    totals: Mapping[str, Any] = field(default_factory=dict)
