"""Asks the engines what they say of themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from rlsys.controller.deadline import within
from rlsys.controller.parts import Fleet
from rlsys.controller.roster import Roster
from rlsys.errors import EngineLost, WaitTimeout
from rlsys.rollout.clock import Clock

REPORT_PERIOD_S = 1.0


async def watch_loop(
    engine: str,
    fleet: Fleet,
    roster: Roster,
    clock: Clock,
    *,
    lose: Callable[[str, str], Awaitable[None]],
    timeout_s: float,
) -> None:
    """One per engine.

    consumes: the engine's reports.
    waits for: the next second.
    unblocked by: the clock.
    produces: what the roster knows of the engine; one that cannot be asked is lost.
    """
    while engine in roster.names:
        try:
            report = await within(timeout_s, f"{engine} to say how loaded it is", fleet.report(engine))
        except (EngineLost, WaitTimeout) as error:
            await lose(engine, str(error))
            return
        roster.observe(engine, report)
        await clock.sleep(REPORT_PERIOD_S)
