"""How old data may be, and how far production may run ahead. Pure functions of records.

The staleness of a token is the step being trained less the step that sampled it; that of a rollout is the staleness of
its oldest trained token. "The step being trained" is the learner's step before the batch: at ``max_staleness`` 0 only
tokens of the very policy being trained pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from rlsys.records import DropCause, Rollout, RolloutGroup, steps_of


def oldest_step(rollout: Rollout, not_before: int = 0) -> int:
    """Step of the oldest token that would be trained, tokens of steps before ``not_before`` left out.

    Raises ValueError where no token would be trained.
    """
    trained_T = steps_of(rollout.versions_T)[rollout.loss_mask_T]
    trained_T = trained_T[trained_T >= not_before]
    if trained_T.size == 0:
        raise ValueError(f"rollout {rollout.rollout_id} has no token to train")
    return int(trained_T.min())


def newest_step(rollout: Rollout) -> int:
    """Step of the newest token that would be trained."""
    return int(steps_of(rollout.versions_T)[rollout.loss_mask_T].max())


def first_trained_step(*, step: int, max_staleness: int, age_policy: str) -> int:
    """Tokens sampled before this step carry no weight when ``step`` is being trained: 0 under ``drop``, where whole
    rollouts leave instead."""
    return max(0, step - max_staleness) if age_policy == "mask" else 0


def drop_stale(group: RolloutGroup, *, step: int, max_staleness: int, age_policy: str) -> RolloutGroup:
    """The group without the rollouts that are too old to be trained at ``step``.

    Under ``drop`` a rollout leaves when any of its trained tokens is too old, under ``mask`` only when all are (its old
    tokens lose their weight when samples are built), under ``pace`` never. The rewards of what leaves stay in the
    group's baseline.
    """
    if age_policy == "pace":
        return group
    age_of = oldest_step if age_policy == "drop" else newest_step
    stale = {
        rollout.rollout_id: DropCause.TOO_STALE for rollout in group.rollouts if step - age_of(rollout) > max_staleness
    }
    return group.drop(stale) if stale else group


def lead_limit(*, max_staleness: int, batch_rollouts: int, oversample: float = 0.0) -> int:
    """Most rollouts that may stand anywhere between submission and commit (AReaL's admission bound, counted from what
    stands instead of from lifetime totals, so that it survives a resume)."""
    return ceil((max_staleness + 1 + oversample) * batch_rollouts)


def may_start(*, ahead: float, max_staleness: int, oversample: float = 0.0) -> bool:
    """Whether another group may be submitted.

    A group holds the room of a whole one until it is trained or gone, however many rollouts it has lost: a batch is so
    many groups, not rollouts. With groups in place of the lost rollouts more of them would stand than can be trained
    within the lead, and the last ones would wait for versions that only they could make. The limit in rollouts
    (``lead_limit``) follows.

    Args:
        ahead: batches that stand, finished or not (``Ledger.ahead``).
        oversample: batches that may stand beyond the lead; what is not finished in time then leaves by its age.
    """
    return ahead < max_staleness + 1 + oversample


def min_engine_step(*, step: int, ahead: float, max_staleness: int) -> int:
    """Oldest version that may sample a group submitted now, so that it is young enough when its turn comes.

    Its turn comes after what stands before it. Being at most ``max_staleness`` behind the learner is not enough, since
    the learner moves on meanwhile. At the lead limit, and beyond it, this is the newest trained version, never one yet
    to be made.

    Args:
        step: batches trained so far.
        ahead: batches that stand before it.
    """
    return max(0, min(step, step + int(ahead) - max_staleness))


def doomed_before(*, step: int, max_staleness: int, age_policy: str) -> int:
    """A rollout under way that an older version than this began can no more be trained, when ``step`` is the next one
    to be taken: 0 but under ``drop``, since new tokens are young."""
    return max(0, step - max_staleness) if age_policy == "drop" else 0


def staleness_of(groups: Iterable[RolloutGroup], step: int, not_before: int = 0) -> list[int]:
    """Staleness of every rollout, steps, in order; tokens sampled before ``not_before`` are not trained."""
    return [step - oldest_step(rollout, not_before) for group in groups for rollout in group.rollouts]
