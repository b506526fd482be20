"""Every error of rlsys. All of them survive pickling, since they cross Ray."""

from __future__ import annotations

DONE, FAILED, CONFIG_ERROR, INTERRUPTED = 0, 1, 2, 130  # exit status of a command


class RlsysError(Exception):
    """Base of every error that rlsys raises on purpose."""


class ConfigError(RlsysError):
    """The configuration, or what it points at, cannot work. Raised before an actor starts (exit status 2).

    Args:
        what: the key or thing that is wrong, e.g. ``data.train_path``.
        got: what was found there.
        wanted: what would have been right.
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, got: str, wanted: str, remedy: str) -> None:
        super().__init__(what, got, wanted, remedy)
        self.what, self.got, self.wanted, self.remedy = what, got, wanted, remedy

    def __str__(self) -> str:
        return f"{self.what}\n  got:    {self.got}\n  wanted: {self.wanted}\n  remedy: {self.remedy}"


class Diverged(RlsysError):
    """A loss, gradient or weight became NaN or infinite; the run stops (exit status 1)."""

    def __init__(self, quantity: str, step: int, last_good_version: str) -> None:
        super().__init__(quantity, step, last_good_version)
        self.quantity, self.step, self.last_good_version = quantity, step, last_good_version

    def __str__(self) -> str:
        return (
            f"{self.quantity} is not finite at step {self.step}. The last good version is {self.last_good_version}. "
            "Lower train.lr, or look at the rewards and at actor/grad_norm of the steps before."
        )


class WaitTimeout(RlsysError):
    """A wait reached its deadline. Names who was waited for."""

    def __init__(self, who: str, seconds: float) -> None:
        super().__init__(who, seconds)
        self.who, self.seconds = who, seconds

    def __str__(self) -> str:
        return f"waited {self.seconds:.0f} s for {self.who}: no answer"


class WeightsRefused(RlsysError):
    """An engine refused a weight version: its bytes differ from the manifest, or its probe failed (law 3)."""


class EngineLost(RlsysError):
    """An engine died, hung or was declared unfit; its running rollouts are gone."""


class RequestRefused(RlsysError):
    """An engine refused one request (for example a prompt longer than its context); the engine itself is well."""


class LearnerFailed(RlsysError):
    """A learner rank died or hung; the group of ranks cannot go on."""


class TeacherFailed(RlsysError):
    """The teacher's actor or its engine died or hung, or it answers none of the requests; the run cannot go on."""


class CheckpointFailed(RlsysError):
    """A checkpoint could not be written (for example because the disk is full). The ones before it still stand."""


class CheckpointDamaged(RlsysError):
    """A checkpoint is not what its manifest says: a file is missing, cut short or changed."""


class TooManyDrops(RlsysError):
    """So many rollouts in a row were dropped that the run cannot be trusted to go on."""


class FleetLost(RlsysError):
    """No rollout engine is left; the run cannot go on."""


class LawBroken(RlsysError):
    """An invariant of the run failed: a rollout unaccounted for, or weight on a token that is too old.

    A bug in rlsys; the run stops rather than go on wrongly.
    """
