"""How far production runs ahead of training, and whether another group may start."""

from __future__ import annotations

from rlsys.buffer.staleness import lead_limit, may_start, min_engine_step
from rlsys.controller.ledger import Ledger
from rlsys.controller.plan import Plan


class Lead:
    """Counts what stands, by groups or by tokens as the run's batches are made.

    Args:
        step: batches trained so far.
    """

    def __init__(self, plan: Plan, ledger: Ledger, step: int) -> None:
        self._plan, self._ledger = plan, ledger
        self._step = step  # behind the learner's version while a step is being booked
        self._num_leases = 0  # that are out

    def room(self) -> int | None:
        """Oldest version that may sample another group; None where there is no room for one, or no need of it."""
        plan, batch, ahead = self._plan, self._plan.batch, self._batches_ahead()
        if self._num_leases > plan.max_staleness:  # the next batch is taken too late for what could be sampled now
            return None
        if batch.by == "sampled_tokens":
            # the pool stays full until the budget is spent: else a phase would end with a few slow ones alone
            is_free = self._ledger.num_unfinished < batch.prompts * (1 + plan.oversample)
            is_free = is_free and may_start(ahead=ahead, max_staleness=plan.max_staleness)
        else:
            is_free = may_start(ahead=ahead, max_staleness=plan.max_staleness, oversample=plan.oversample)
        # batches of tokens have any number of groups: only the end of the run tells how many were needed
        is_needed = self._step + ahead < plan.steps + plan.oversample or batch.by != "prompts"
        return (
            min_engine_step(step=self._step, ahead=ahead, max_staleness=plan.max_staleness)
            if is_free and is_needed
            else None
        )

    def _batches_ahead(self) -> float:
        """Those that a group submitted now comes after."""
        ledger, batch = self._ledger, self._plan.batch
        match batch.by:
            case "prompts":
                return ledger.num_groups / batch.prompts
            case "trained_tokens":
                return self._num_leases + ledger.finished_tokens / batch.tokens + ledger.num_unfinished / batch.prompts
            case "sampled_tokens":  # what is unfinished is overtaken, or ends beside it
                return self._num_leases + ledger.finished_tokens / batch.tokens

    def gauges(self) -> dict[str, float]:
        """Rollouts that stand, and how many may, where batches are made by questions."""
        plan, lead = self._plan, {"buffer/lead": float(self._ledger.lead)}
        if plan.batch.by != "prompts":
            return lead
        limit = lead_limit(
            max_staleness=plan.max_staleness, batch_rollouts=plan.batch_members, oversample=plan.oversample
        )
        return {**lead, "buffer/lead_limit": float(limit)}

    def leased(self) -> None:
        """A batch was taken."""
        self._num_leases += 1

    def trained(self, step: int) -> None:
        """A batch was booked as trained; they are ``step`` by now."""
        self._step, self._num_leases = step, self._num_leases - 1
