"""A machine's copies of the weights: brought once for all its engines, given up with the process that keeps them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rlsys.actors.mirror import NodeMirror
from rlsys.errors import EngineLost, WeightsRefused
from rlsys.records import START, Probe, WeightVersion
from rlsys.weights.tcp import Source

WEIGHTS = WeightVersion(
    version=START, segment="learner", tensors=(), probe=Probe(token_ids=(), logprobs=()), previous_probe=None
)
SOURCE = Source(host="127.0.0.1", port=1, token="")


def mirror_that(bring) -> NodeMirror:
    return NodeMirror("mirror", SimpleNamespace(mirror=SimpleNamespace(remote=bring)), ["a", "b"], SOURCE)


def test_all_engines_of_a_machine_share_one_copy_of_a_version():
    brought = []

    async def bring(weights, source, path):
        brought.append(path)
        await asyncio.sleep(0)
        return replace(weights, segment=path)

    async def load(mirror) -> str:
        async with mirror.holding(WEIGHTS) as there:
            return there.segment

    async def main():
        mirror = mirror_that(bring)
        assert await asyncio.gather(*(load(mirror) for _ in range(3))) == ["a"] * 3

    asyncio.run(main())
    assert brought == ["a"]


@pytest.mark.parametrize(("error", "is_lost"), [(EngineLost("it died"), True), (WeightsRefused("a gap"), False)])
def test_a_mirror_whose_process_is_gone_is_of_no_more_use_and_one_that_was_refused_weights_is(error, is_lost):
    async def fail(weights, source, path):
        raise error

    async def main():
        mirror = mirror_that(fail)
        assert not mirror.is_lost
        with pytest.raises(type(error)):
            async with mirror.holding(WEIGHTS):
                raise AssertionError("nothing was brought")
        assert mirror.is_lost == is_lost

    asyncio.run(main())
