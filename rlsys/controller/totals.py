"""Sums over a run, for result.json and the progress view."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from rlsys.controller.roster import EngineSeconds
from rlsys.controller.stats import Work, balance_metrics, idle_share, pace_metrics
from rlsys.records import Rollout, RolloutGroup

WINDOW_STEPS = 16  # the balance of a step is that of the last so many: one alone has too few rollouts to go by


@dataclass(slots=True)
class Totals:
    """Figures over all stretches of training of a run: it has one more for each time it was resumed.

    Attributes:
        wall_s: seconds of training.
        wait_for_batch_s: of these, seconds in which the learner had nothing to train.
        train_s: of these, seconds from a batch in hand until its weights were published.
        service_s: of these, seconds in which an engine was in service, added up over the engines.
        busy_s: of those, seconds in which it had something to do.
        rollouts, tokens: trained; tokens are sampled ones.
        made: rollouts fit to be trained: trained ones, and those that lay in the buffer after the last step.
        sampled_tokens: what the engines answered with meanwhile, in rollouts that were dropped and in evaluations too.
        staleness_sum, staleness_max: over the trained rollouts, steps.
        evals: results of the evaluations before and after.
    """

    wall_s: float = 0.0
    wait_for_batch_s: float = 0.0
    train_s: float = 0.0
    service_s: float = 0.0
    busy_s: float = 0.0
    rollouts: int = 0
    tokens: int = 0
    made: int = 0
    sampled_tokens: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    evals: dict[str, float] = field(default_factory=dict)
    _opened: tuple[float, EngineSeconds] | None = None  # clock and engines when the present stretch began
    _marks: deque[Work] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))  # sums after the last steps

    @classmethod
    def resumed(cls, saved: Mapping[str, Any]) -> Self:
        return cls(**saved)

    def book(self, groups: Sequence[RolloutGroup], ages: Sequence[int]) -> None:
        """Add trained groups, with the staleness of each of their rollouts."""
        self.rollouts += len(ages)
        self.tokens += sum(rollout.num_sampled_tokens for group in groups for rollout in group.rollouts)
        self.staleness_sum += sum(ages)
        self.staleness_max = max(self.staleness_max, *ages)

    def sample(self, rollout: Rollout) -> None:
        """An engine has ended this one. Outside of a stretch of training nothing is counted."""
        if self._opened is not None:
            self.sampled_tokens += rollout.num_sampled_tokens

    def open(self, now: float, engines: EngineSeconds) -> None:
        """A stretch of training begins.

        Args:
            now: seconds of the handed-in clock, here and below.
            engines: what they were in service and busy until now, likewise.
        """
        self._opened = (now, engines)
        self._marks.clear()
        self._marks.append(self._work(now, engines))

    def close(self, now: float, engines: EngineSeconds) -> None:
        """It ends."""
        self.wall_s, self.service_s, self.busy_s = self._times(now, engines)
        self._opened = None

    def saved(self, now: float, engines: EngineSeconds) -> dict[str, Any]:
        """Plain values for a checkpoint, the present stretch included."""
        wall_s, service_s, busy_s = self._times(now, engines)
        plain = asdict(replace(self, wall_s=wall_s, service_s=service_s, busy_s=busy_s))
        del plain["_opened"], plain["_marks"]
        return plain

    def summary(self, now: float, engines: EngineSeconds) -> dict[str, float]:
        """Flat figures; rates are over the training alone, without start-up and evaluation before and after."""
        wall_s, service_s, busy_s = self._times(now, engines)
        wall_s = max(wall_s, 1e-9)
        return {
            **self.evals,
            "rollouts": self.rollouts,
            "wall_s": wall_s,
            "rollouts_per_s": self.rollouts / wall_s,
            "tokens_per_s": self.tokens / wall_s,
            "idle/trainer": min(1.0, self.wait_for_batch_s / wall_s),
            "idle/rollout": idle_share(service_s, busy_s),
            "staleness/max": self.staleness_max,
            "staleness/mean": self.staleness_sum / max(self.rollouts, 1),
        }

    def step_balance(
        self, now: float, engines: EngineSeconds, *, buffered: int, engine_cores: float, trainer_cores: float
    ) -> dict[str, float]:
        """After a step is booked: rates of both sides in the last ``WINDOW_STEPS`` steps of this stretch, what they
        came to together, and how much of the time each was idle.

        Args:
            buffered: rollouts that lie in the buffer or are leased for a later step.
            engine_cores, trainer_cores: as for ``balance_metrics``.
        """
        self.made = self.rollouts + buffered
        present = self._work(now, engines)
        recent = present.since(self._marks[0])
        self._marks.append(present)
        return {
            **balance_metrics(recent, engine_cores=engine_cores, trainer_cores=trainer_cores),
            **pace_metrics(recent),
        }

    def run_balance(
        self, now: float, engines: EngineSeconds, *, engine_cores: float, trainer_cores: float
    ) -> dict[str, float]:
        """The same rates over the whole run."""
        return balance_metrics(self._work(now, engines), engine_cores=engine_cores, trainer_cores=trainer_cores)

    def _work(self, now: float, engines: EngineSeconds) -> Work:
        wall_s, service_s, busy_s = self._times(now, engines)
        return Work(
            wall_s=wall_s,
            wait_s=self.wait_for_batch_s,
            train_s=self.train_s,
            service_s=service_s,
            busy_s=busy_s,
            made=self.made,
            trained=self.rollouts,
            sampled_tokens=self.sampled_tokens,
            trained_tokens=self.tokens,
        )

    def _times(self, now: float, engines: EngineSeconds) -> tuple[float, float, float]:
        """All of the time; the engines' in service; of it the busy one."""
        if self._opened is None:
            return self.wall_s, self.service_s, self.busy_s
        began, before = self._opened
        return (
            self.wall_s + now - began,
            self.service_s + engines.in_service - before.in_service,
            self.busy_s + engines.busy - before.busy,
        )
