"""Weight sync: who pulls when. On virtual time, with simulated engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from rlsys.controller.roster import Roster
from rlsys.controller.sync import WeightSync
from rlsys.records import START, LoadReport, Version, WeightVersion
from rlsys.sim.clock import VirtualClock
from rlsys.sim.fleet import SimLearner
from rlsys.weights.pool import SegmentPool

LOAD_S = 1.0


class CountingFleet:
    """Loads take a second each. Remembers how many ran at once, and which version each engine took over."""

    def __init__(self, names: Sequence[str], clock: VirtualClock) -> None:
        self._names, self._clock = names, clock
        self.loading = self.most_loading = 0
        self.loaded: list[tuple[str, int]] = []

    def names(self) -> Sequence[str]:
        return self._names

    async def load(self, engine: str, weights: WeightVersion) -> LoadReport:
        self.loading += 1
        self.most_loading = max(self.most_loading, self.loading)
        await self._clock.sleep(LOAD_S)
        self.loading -= 1
        self.loaded.append((engine, weights.version.step))
        return LoadReport(engine=engine, version=weights.version, pause_s=LOAD_S, total_s=LOAD_S, probe_difference=0.0)


class SilentSink:
    def event(self, text: str) -> None:
        raise AssertionError(text)


async def lose_none(engine: str, reason: str) -> None:
    raise AssertionError(f"{engine}: {reason}")


def synced(num_engines: int, share: float, versions: int, gap_s: float) -> tuple[CountingFleet, float]:
    """Publish versions one after another, then wait until every engine serves the last. Returns the fleet and the
    seconds."""
    clock = VirtualClock()
    names = [f"rollout-{number}" for number in range(num_engines)]
    fleet = CountingFleet(names, clock)

    async def main() -> float:
        sync = WeightSync(
            learner=SimLearner(clock, START, step_s=0.0, export_s=0.0),
            fleet=fleet,  # type: ignore[arg-type]
            roster=Roster(names, slots=8, clock=clock),
            segments=SegmentPool(["a", "b"]),
            clock=clock,
            sink=SilentSink(),  # type: ignore[arg-type]
            lose=lose_none,
            export_timeout_s=10.0,
            load_timeout_s=10.0,
            start_timeout_s=10.0,
            share=share,
        )
        pulls = [asyncio.create_task(sync.pull_loop(name)) for name in names]
        for step in range(versions - 1):
            await sync.publish(Version(incarnation=0, step=step))
            await clock.sleep(gap_s)
        await sync.publish_everywhere(Version(incarnation=0, step=versions - 1))
        for pull in pulls:
            pull.cancel()
        return clock.now()

    return fleet, clock.run(main())


@pytest.mark.parametrize(
    ("num_engines", "share", "at_once", "seconds"),
    [(4, 1.0, 4, 1.0), (4, 0.5, 2, 2.0), (4, 0.25, 1, 4.0), (5, 0.5, 2, 3.0), (3, 0.1, 1, 3.0)],
)
def test_a_share_of_the_fleet_takes_over_at_a_time(num_engines, share, at_once, seconds):
    fleet, took_s = synced(num_engines, share, versions=1, gap_s=0.0)
    assert fleet.most_loading == at_once and took_s == pytest.approx(seconds)
    assert sorted(fleet.loaded) == [(f"rollout-{number}", 0) for number in range(num_engines)]


def test_whose_turn_comes_late_takes_the_newest_version_and_skips_what_was_overtaken():
    fleet, _ = synced(4, 0.25, versions=3, gap_s=1.5)
    for name in fleet.names():
        steps = [step for engine, step in fleet.loaded if engine == name]
        assert steps == sorted(set(steps)) and steps[-1] == 2
    assert len(fleet.loaded) < 4 * 3 and fleet.most_loading == 1
