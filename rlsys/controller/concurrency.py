"""How many rollouts an engine is given at once: as many as its slots, fewer while its key-value cache overflows."""

from __future__ import annotations

from rlsys.rollout.router import EngineReport

FULL_KV_SHARE = 0.95  # of the cache in use, with requests waiting: there is no room for one more
TIGHT_KV_SHARE = 0.8  # with less in use, requests were thrown out by a weight swap, which empties the cache
SHRINK = 0.75  # of the usable slots are left
GROW = 1  # slots for each report


def is_overfull(report: EngineReport, before: EngineReport | None) -> bool:
    """Whether the engine has more than its cache holds: it is full while requests wait, or it threw some out to make
    room since the report ``before`` (None: nothing to compare with). One that keeps no statistics never is."""
    if report.kv_share is None or report.num_waiting is None:
        return False
    is_full = report.kv_share > FULL_KV_SHARE and report.num_waiting > 0
    has_preempted = before is not None and (report.num_preempted or 0) > (before.num_preempted or 0)
    return is_full or (has_preempted and report.kv_share > TIGHT_KV_SHARE)


def usable_slots(usable: int, *, slots: int, running: int, is_overfull: bool) -> int:
    """Additive increase, multiplicative decrease, from 1 to ``slots``.

    It shrinks again only once the last shrinking shows, that is once no more than ``usable`` run: rollouts under way
    are never taken away. It grows only while it is what holds the engine back.
    """
    if is_overfull:
        return max(1, int(usable * SHRINK)) if running <= usable else usable
    return min(slots, usable + GROW) if running >= usable else usable
