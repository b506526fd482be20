"""Whole runs whose engines refuse some requests and answer others with nothing: counted drops, no rewards of 0."""

from __future__ import annotations

from collections import Counter

import pytest

from rlsys.errors import RequestRefused, TooManyDrops
from rlsys.records import DropCause, Turn
from rlsys.rollout.engine import GenerateRequest
from rlsys.sim.world import SimReport, World, simulate


def run(world: World, *, refused: Counter[str], empty: Counter[str]) -> SimReport:
    """Play ``world``; of each question refuse, or answer with nothing, that many members."""

    def spoil(loops, fleet) -> None:
        for engine in fleet.engines.values():
            engine.generate = spoilt(engine.generate)

    def spoilt(generate):
        async def generate_or_not(request: GenerateRequest) -> Turn:
            draw, _, rest = request.request_id.partition("#")  # sim:0:3#0/1:0 is the first turn of member 1
            member = int(rest.partition("/")[2].partition(":")[0])
            if member < refused[draw]:
                raise RequestRefused("a prompt longer than the context")
            turn = await generate(request)
            if member < refused[draw] + empty[draw]:
                return Turn(
                    token_ids_T=turn.token_ids_T[:0],
                    behaviour_logprobs_T=turn.behaviour_logprobs_T[:0],
                    versions_T=turn.versions_T[:0],
                    stop_reason=turn.stop_reason,
                )
            return turn

        return generate_or_not

    return simulate(world, spoil)


def test_refused_and_empty_members_are_counted_drops_and_never_rewards():
    world = World(steps=6, num_questions=24)
    refused, empty = Counter({"sim:0:3": 1, "sim:0:5": 4, "sim:0:7": 1}), Counter({"sim:0:7": 1, "sim:0:9": 3})
    report = run(world, refused=refused, empty=empty)
    dropped = report.loops.ledger.dropped
    assert report.loops.ledger.submitted == report.loops.ledger.trained + dropped.total()
    # question 5 is not asked again; question 9, of which one answer is too few to compare, three times
    assert dropped[DropCause.ENGINE_REFUSED] == 1 + 4 + 1 and dropped[DropCause.EMPTY] == 1 + 4 * 3
    assert any("question sim:0:9 is given up after 4 attempts" in event for event in report.sink.events)
    trained = {str(group.prompt.draw): group for _, groups in report.trained for group in groups}
    assert [len(trained[draw].rollouts) for draw in ("sim:0:3", "sim:0:7")] == [3, 2]
    assert [len(trained[draw].baseline_rewards) for draw in ("sim:0:3", "sim:0:7")] == [3, 2]  # no zero for the others
    assert {"sim:0:5", "sim:0:9"} & trained.keys() == set()
    assert len(report.trained) == world.steps  # other questions took their place


def test_an_engine_that_refuses_everything_stops_the_run_with_its_reason():
    everything = Counter({f"sim:{epoch}:{index}": 4 for epoch in range(9) for index in range(40)})
    with pytest.raises(TooManyDrops, match="engine_refused a prompt longer than the context"):
        run(World(), refused=everything, empty=Counter())
