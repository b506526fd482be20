"""What the person who watches is shown meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlsys.controller.ledger import Ledger
from rlsys.controller.parts import Parts
from rlsys.controller.roster import Roster
from rlsys.controller.stats import drop_metrics

LIVE_PERIOD_S = 0.5  # between two updates


async def live_loop(parts: Parts, ledger: Ledger, roster: Roster, figures: Callable[[], Mapping[str, float]]) -> None:
    """Show the present state.

    consumes: counts, and further ``figures`` of the run.
    waits for: the next half second.
    unblocked by: the clock.
    produces: the progress view and the gauges.
    """
    while True:
        await parts.clock.sleep(LIVE_PERIOD_S)
        ledger.check()
        parts.sink.live(
            {
                **{f"buffer/{stage.value}": count for stage, count in ledger.counts().items()},
                **drop_metrics(ledger.dropped),
                "rollout/running": roster.num_running,
                "rollout/slots": roster.num_slots,
                "rollout/engines": roster.num_in_service,
                **figures(),
            }
        )
